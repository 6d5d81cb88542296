"""Manage the processes of a run: their ranks, their collectives, and the cores that each process uses."""
