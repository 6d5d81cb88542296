"""The folder that a run writes into: file names, lock, metrics."""
