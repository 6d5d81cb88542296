"""Documents and the encoders that turn their text into tokens."""
