"""Measure the store, the heartbeats, the saves, the loader and the metrics of a run with thousands of ranks."""
