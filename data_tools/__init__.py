"""Run stage 1: convert documents to token shards, which are files of token ids. This package does not import torch."""
