"""Measure the control plane of a run with thousands of ranks: store, heartbeats, saves, loader and metrics."""
