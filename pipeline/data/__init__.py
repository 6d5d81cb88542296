"""Turn token shards into micro-batches: open the datasets, mix them, order the samples, and load the micro-batches."""
