"""Token shards to micro-batches: datasets, mixtures, sample order, loaders."""
