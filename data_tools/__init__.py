"""Stage 1: turn documents into token shards. This package does not import torch."""
