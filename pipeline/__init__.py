"""Run stages 2 and 3: train checkpoints from token shards, and evaluate checkpoints. See docs/design.md."""
