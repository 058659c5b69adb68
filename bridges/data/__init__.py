"""From pictures and conversations to tensors. Nothing here knows a model."""
