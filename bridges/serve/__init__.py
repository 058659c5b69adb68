"""The model behind an address: OpenAI's interface for chats, over HTTP."""
