"""Evaluate checkpoints (stage 3). ``run`` runs tasks, ``tasks`` defines named tasks, ``scoring`` scores requests."""
