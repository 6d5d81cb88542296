"""Define the schema of the run config, and load a config from JSON files and overrides."""
