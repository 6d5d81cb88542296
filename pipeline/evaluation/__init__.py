"""Stage 3: from a checkpoint to numbers. One file a task, registered in ``tasks``."""
