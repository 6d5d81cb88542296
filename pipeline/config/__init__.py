"""The run config: its schema, and how JSON files and overrides are loaded into it."""
