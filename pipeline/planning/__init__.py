"""Plan the memory and speed of a run before buying GPUs. See ``docs/planning.md``."""
