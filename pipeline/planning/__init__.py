"""Plan how much memory and time a run will need on given GPUs. See ``docs/planning.md``."""
