"""Damage valid input files, and check that every command either succeeds or ends with one error line."""
