"""Run stage 1: convert documents to token shards. This package does not import torch."""
