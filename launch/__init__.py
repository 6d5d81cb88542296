"""Define the commands. Each command parses its arguments, calls one function, and returns an exit status."""
