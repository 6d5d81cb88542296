"""Token shards to micro-batches: data sets, mixtures, sample order, loaders."""
