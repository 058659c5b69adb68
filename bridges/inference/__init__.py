"""Answers of a trained model: many at once, or turn by turn with what was already read kept."""
