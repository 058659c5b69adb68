"""The two frozen ends of a bridge."""
