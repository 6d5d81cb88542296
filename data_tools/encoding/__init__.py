"""Define documents, and the encoders that convert text to tokens."""
