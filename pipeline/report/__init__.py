"""What a person sees of finished and running runs: one HTML page and pictures, from what a run folder holds."""
