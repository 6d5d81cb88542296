"""Check whether this machine can train, and suggest a solution for each problem."""
