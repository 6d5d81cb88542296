"""Text from a model: sampling, key-value caching, streaming."""
