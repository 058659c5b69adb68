"""Talk with a trained model about pictures: `bridges chat CHECKPOINT`, or `python -m chat CHECKPOINT`."""
