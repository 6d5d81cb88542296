"""Plan the memory and speed of a run before you buy GPUs. See ``docs/planning.md``."""
