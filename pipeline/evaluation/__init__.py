"""Stage 3: from a checkpoint to numbers. ``tasks`` runs them, ``catalogue`` names them, ``scoring`` scores."""
