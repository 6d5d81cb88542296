"""Run the pipeline on several simulated hosts of one Linux machine. Some cases cut off a host or a network link."""
