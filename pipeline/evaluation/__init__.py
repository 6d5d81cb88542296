"""Stage 3: from a checkpoint to figures. ``run`` runs tasks, ``tasks`` names them, ``scoring`` scores requests."""
