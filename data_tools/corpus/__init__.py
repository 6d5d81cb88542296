"""Stage 1 from end to end: divide the source into chunks, encode the chunks in parallel, write shards and manifest."""
