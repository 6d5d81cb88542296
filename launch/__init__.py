"""The commands: each parses, calls one function, and ends with a status."""
