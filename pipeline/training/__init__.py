"""The training loop and what surrounds it: start, resume, schedule, interruption, throughput."""
