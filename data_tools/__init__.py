"""Run stage 1: convert documents to token shards (files of token ids). This package does not import torch.

A file that is missing, damaged or not accessible causes a ``DataError``. Functions in ``data_tools.storage`` may raise
other errors.
"""
