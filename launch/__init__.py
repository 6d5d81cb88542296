"""The commands. Each one parses its arguments, calls one function, and ends with an exit status."""
