"""Measure the speed, memory use and correctness of the pipeline. The results are in docs/benchmarks."""
