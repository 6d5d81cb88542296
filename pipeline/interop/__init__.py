"""Exchange checkpoints with other programs: Hugging Face, nanoGPT."""
