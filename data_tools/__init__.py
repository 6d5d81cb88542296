"""Run stage 1: convert documents to token shards (files of token ids). This package does not import torch."""
