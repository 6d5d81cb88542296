"""Define the run folder: its file names, its lock, and the metrics in it."""
