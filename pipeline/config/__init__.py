"""The run config: its schema, and how JSON files and overrides become one."""
