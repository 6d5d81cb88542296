"""Check whether this machine can train, and name a cure for each problem."""
