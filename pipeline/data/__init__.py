"""Turn token shards into micro-batches: open the datasets, order their samples, and load the micro-batches."""
