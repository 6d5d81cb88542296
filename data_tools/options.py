"""The choices of stage 1's options, in a module that imports nothing else."""

from typing import Literal

SourceKind = Literal["text", "jsonl", "instructions", "parquet", "hf", "fineweb-edu", "python-stdlib"]
ShardFormat = Literal["npy", "arrow"]
Deduplication = Literal["off", "exact"]
EncoderChoice = Literal["auto", "gigatoken", "tiktoken"]
BadRows = Literal["stop", "skip"]
Engine = Literal["local", "ray"]
