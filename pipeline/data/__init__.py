"""Turn token shards into micro-batches."""
