"""Check a machine with GPUs in about ten minutes: correctness, speed, memory and, with several GPUs, overlap."""
