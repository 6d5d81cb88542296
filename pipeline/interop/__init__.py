"""Checkpoints to and from other programs: Hugging Face, nanoGPT."""
