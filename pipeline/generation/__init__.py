"""Generating text: sampling, key-value caching, streaming."""
