"""Define the allowed values of the options of stage 1. This module imports no other module of the project."""

from typing import Literal

SourceKind = Literal["text", "jsonl", "instructions", "parquet", "hf", "fineweb-edu", "python-stdlib"]
ShardFormat = Literal["npy", "arrow"]
Deduplication = Literal["off", "exact"]
EncoderChoice = Literal["auto", "gigatoken", "tiktoken"]
BadRows = Literal["stop", "skip"]
Engine = Literal["local", "ray"]
