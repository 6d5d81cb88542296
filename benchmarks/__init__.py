"""Measure speed, memory and agreement with real runs. The results are in docs/benchmarks."""
