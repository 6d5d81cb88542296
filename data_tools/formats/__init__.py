"""Token files of other programs, and folders in our format: inspect and convert them through one interface.

Read and written are nanoGPT's ``train.bin`` and the shards of llm.c and modded-nanogpt; read only is the ``.bin`` with
``.idx`` of Megatron-LM and gpt-neox. ``open_collection`` opens them, ``plan_files`` plans the new files and ``convert``
writes them.
"""
