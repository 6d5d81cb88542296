"""Evaluate checkpoints on benchmark tasks (stage 3). The module ``run`` runs tasks, and ``tasks`` defines them."""
