"""Train a model: start, resume, run and stop the training."""
