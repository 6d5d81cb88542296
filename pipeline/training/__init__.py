"""The training loop and its surroundings: start, resume, schedule, interruption, throughput."""
