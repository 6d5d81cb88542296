"""Manage the processes of a run, and the hardware that each process uses."""
