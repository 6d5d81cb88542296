"""To and from folders of Hugging Face ``transformers``, which itself is not needed."""
