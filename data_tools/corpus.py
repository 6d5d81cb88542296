"""Stage 1: documents of a source to shards in a folder, in parallel, crash-safe and reproducible."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.arrays import CountArray, TokenArray
from data_tools.errors import DataError
from data_tools.journal import JOURNAL_NAME, Journal
from data_tools.parallel import ordered_map
from data_tools.shards import (
    MANIFEST_NAME,
    SHARD_FORMATS,
    Manifest,
    ShardRecord,
    ShardWriter,
    SourceRecord,
    TokenizerRecord,
    load_manifest,
    open_split,
)
from data_tools.shards.manifest import TRAIN_SPLIT, VAL_SPLIT
from data_tools.shards.reader import map_shard
from data_tools.sources import Source, SourceRequest, open_source
from data_tools.storage import TEMPORARY_SUFFIX, one_line_write_errors, write_json_durably
from data_tools.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    TOKENIZER_NAME,
    EncodedDocuments,
    load_tokenizer,
    replace_lone_surrogates,
    utf8_length,
)

# Large enough that sending a batch to a worker costs little, small enough that many fit into memory.
_BATCH_CHARACTERS = 1 << 20
