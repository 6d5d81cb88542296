"""Train a model: start or resume a run, run the training loop, handle interruptions, and measure the throughput."""
