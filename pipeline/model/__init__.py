"""GPT-2 and its layers. Nothing here knows a backend."""
