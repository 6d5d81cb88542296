"""Import and export folders of Hugging Face ``transformers``, without using ``transformers``."""
