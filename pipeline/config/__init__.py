"""The schema of the run config, and functions that load a config from JSON files and overrides."""
