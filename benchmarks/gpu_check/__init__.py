"""Check a machine with GPUs: correctness, speed, memory and, with several GPUs, overlap."""
