"""Inspect and convert token files of other programs, and folders of this project, through one interface.

nanoGPT's ``train.bin`` and the shards of llm.c and modded-nanogpt can be read and written. The pairs of ``.bin`` and
``.idx`` files of Megatron-LM and gpt-neox, and the ``.npy`` files of build-nanogpt, can only be read.
``open_collection`` opens the files of any format, ``plan_files`` plans new files, and ``convert`` writes new files.
"""
