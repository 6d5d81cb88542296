"""Measure speed, memory and agreement with real runs. docs/benchmarks has the results."""
