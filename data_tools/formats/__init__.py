"""Inspect and convert token files of other programs and token shards of this project.

This package reads and writes nanoGPT's ``train.bin``, and the shards of llm.c and modded-nanogpt. It only reads the
pairs of ``.bin`` and ``.idx`` files of Megatron-LM and gpt-neox, and the ``.npy`` files of build-nanogpt.

``open_collection`` opens the files of any format, ``plan_files`` plans new files, and ``convert`` writes new files.
"""
