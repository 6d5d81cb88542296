"""Inspect and convert token files of other programs and token shards of this project.

The package reads and writes files of nanoGPT, llm.c and modded-nanogpt. It reads files of Megatron-LM, gpt-neox and
build-nanogpt, but does not write them.
"""
