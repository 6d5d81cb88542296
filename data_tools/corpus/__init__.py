"""Run stage 1: tokenize a source into a folder of shards with a manifest."""
