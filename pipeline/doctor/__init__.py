"""Whether this machine can do what the stages need: each finding with its cure."""
