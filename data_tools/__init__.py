"""Run stage 1: convert documents to token shards (files of token ids). This package does not import torch.

If a file is missing, damaged, or cannot be read or written, functions raise ``DataError`` unless stated otherwise.
"""
