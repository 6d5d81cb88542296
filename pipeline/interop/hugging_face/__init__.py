"""Import and export model folders of Hugging Face ``transformers``. The package ``transformers`` is not needed."""
