"""GPT-2 and its parts. Nothing here knows a backend."""
