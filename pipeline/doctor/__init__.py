"""Check whether this machine can train, and name a solution for each problem."""
