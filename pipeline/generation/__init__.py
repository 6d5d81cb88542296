"""Generate text: draw tokens, cache keys and values, and show the text while it is generated."""
