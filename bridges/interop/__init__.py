"""Released weights in, Hugging Face folders out: one file a format."""
