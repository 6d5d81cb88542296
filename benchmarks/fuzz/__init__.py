"""Damage valid input files, and check that every command either succeeds or ends with one error line.

``damage`` changes files, ``trial`` runs a command on damaged files in this process and judges how the command ended,
and ``data_groups`` and ``model_groups`` list the inputs and the commands.
``python -m benchmarks.fuzz`` runs everything.
"""
