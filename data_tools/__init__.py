"""Run stage 1: convert documents to token shards (files of token ids). This package does not import torch.

In all modules outside the sub-package ``storage``, a file that is missing, damaged or not accessible causes a
``DataError``.
"""
