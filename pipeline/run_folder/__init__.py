"""The folder that a run writes: names, lock, metrics."""
