"""Stages 2 and 3: token shards to checkpoints, checkpoints to results. See docs/design.md."""
