"""Run stage 1: divide the source into chunks, encode the chunks in parallel, and write the shards and the manifest."""
