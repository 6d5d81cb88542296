"""Stage 1 from end to end: divide the source into chunks, encode them in parallel, write shards and manifest."""
