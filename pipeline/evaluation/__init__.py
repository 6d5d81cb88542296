"""Evaluate checkpoints (stage 3). ``run`` runs tasks, ``tasks`` defines them, and ``scoring`` scores requests."""
