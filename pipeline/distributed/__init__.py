"""The processes of a run and the hardware each one computes on."""
