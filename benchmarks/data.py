"""Compare the speed of stage 1 with other tools on the same documents. The ids of all tools must be identical.

python -m benchmarks.data                       # what `make bench-data` runs
python -m benchmarks.data --megabytes 100 --memory-megabytes 50 200

Contenders run one after the other on all cores, each in a separate process. The table shows medians. The time of a
whole stage includes the start of its process. Contenders that are only encoders encode documents in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.limits import available_cores
from data_tools.shards.manifest import TRAIN_SPLIT
from data_tools.shards.reader import open_split
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from tests.support.runs import REPOSITORY
from tests.support.tables import print_header, print_row

_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".js", ".json", ".html", ".css", ".yaml")
_LARGEST_DOCUMENT_BYTES = 1 << 20
_POLL_S = 0.05


@dataclass(frozen=True)
class Measured:
    seconds: dict[str, float]  # by the name of the row in the table
    peak_mb: float | None  # memory of all processes, with shared pages counted once; None if not measured
    sha256: str  # hash of all tokens as uint16, in the order of the documents


# --- documents


def distinct_documents(megabytes: float) -> Iterator[str]:
    """Yield distinct texts of this Python installation. If there are too few, repeat texts with a number in front."""
    left = megabytes * 1e6
    for lap in itertools.count():
        seen: set[bytes] = set()
        for path in _text_files():
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or not content or len(content) > _LARGEST_DOCUMENT_BYTES:
                continue
            seen.add(digest)
            text = content.decode("utf-8", "replace")
            yield f"{lap}\n{text}" if lap else text
            left -= len(content)
            if left <= 0:
                return


def _text_files() -> Iterator[Path]:
    folders = sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    for folder in folders:
        for parent, names, files in os.walk(folder):
            names.sort()
            yield from (Path(parent, name) for name in sorted(files) if name.endswith(_SUFFIXES))


def write_inputs(folder: Path, megabytes: float) -> dict[str, Path]:
    paths = {"jsonl": folder / "documents.jsonl", "parquet": folder / "documents.parquet"}
    schema = pa.schema([("text", pa.string())])
    with paths["jsonl"].open("w", encoding="utf-8") as lines, pq.ParquetWriter(paths["parquet"], schema) as rows:
        documents = distinct_documents(megabytes)
        while group := list(itertools.islice(documents, 1000)):
            lines.writelines(json.dumps({"text": document}) + "\n" for document in group)
            rows.write_table(pa.table({"text": group}, schema))
    return paths


def read_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column(0).to_pylist()
    else:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


# --- contenders: each returns a function that reads its tokens, and its measured seconds

Tokens = npt.NDArray[np.uint16]
#: The seconds are None for the time of the whole process. Otherwise, they are those of one or several table rows.
Done = tuple[Callable[[], Tokens], float | dict[str, float] | None]

_OURS = "this project"
_OURS_VERIFIED = "this project, then verified"


def ours(source: Path, out: Path) -> Done:
    """Run the commands that a user would run: tokenize, then verify every hash and count."""
    tokenize = ["tokenize_corpus.py", "--source", source.suffix[1:], "--input", str(source), "--val-fraction", "0"]
    commands = {_OURS: [*tokenize, "--out", str(out)], _OURS_VERIFIED: ["shards.py", "verify", str(out)]}
    seconds = {}
    started = time.perf_counter()
    for row, (script, *arguments) in commands.items():
        command = [sys.executable, str(REPOSITORY / "launch" / script), *arguments]
        subprocess.run(command, check=True, capture_output=True)
        seconds[row] = time.perf_counter() - started
    stream = open_split(out, TRAIN_SPLIT)
    return lambda: stream.read(0, stream.tokens), seconds


def pool_of_tiktoken(source: Path, out: Path) -> Done:
    """Encode in a pool of processes, fill one shard array and save it, as build-nanogpt does."""
    shard_tokens = 100_000_000
    shard: Tokens = np.empty((shard_tokens,), dtype=np.uint16)
    filled, shards = 0, 0
    out.mkdir()
    with multiprocessing.Pool(available_cores()) as pool:
        for tokens in pool.imap(_tokenize_one, read_texts(source), chunksize=16):
            if filled + len(tokens) > shard_tokens:
                room = shard_tokens - filled
                shard[filled:] = tokens[:room]
                np.save(out / f"{shards:06d}.npy", shard)
                shards, tokens = shards + 1, tokens[room:]
                filled = 0
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    np.save(out / f"{shards:06d}.npy", shard[:filled])
    return lambda: np.concatenate([np.load(path) for path in sorted(out.iterdir())]), None


def _tokenize_one(text: str) -> Tokens:
    return np.array([END_OF_TEXT, *_tiktoken().encode_ordinary(text)]).astype(np.uint16)


@cache
def _tiktoken() -> Any:
    """Return tiktoken's encoding with our vocabulary, without a network."""
    return load_tokenizer()._encoding


def datasets_map(source: Path, out: Path) -> Done:
    """Encode with ``datasets.map`` on all cores and fill a memory map batch by batch, as nanoGPT's prepare.py does."""
    import datasets

    kind = "parquet" if source.suffix == ".parquet" else "json"
    cache = str(out.with_suffix(".cache"))
    dataset = datasets.load_dataset(kind, data_files=str(source), split="train", cache_dir=cache)
    tokenized = dataset.map(_tokenize_row, remove_columns=["text"], num_proc=available_cores())
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    result: Tokens = np.memmap(out, dtype=np.uint16, mode="w+", shape=(total,))
    filled, batches = 0, min(1024, len(tokenized))
    for index in range(batches):
        batch = tokenized.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        result[filled : filled + len(ids)] = ids
        filled += len(ids)
    result.flush()  # type: ignore[attr-defined]
    return lambda: np.asarray(result), None


def _tokenize_row(row: dict[str, str]) -> dict[str, Any]:
    ids = [END_OF_TEXT, *_tiktoken().encode_ordinary(row["text"])]
    return {"ids": ids, "len": len(ids)}


def bare_tiktoken(source: Path, out: Path) -> Done:
    return _encode_in_memory(source, partial(_tiktoken().encode_ordinary_batch, num_threads=available_cores()))


def bare_gigatoken(source: Path, out: Path) -> Done:
    import gigatoken

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt2.tiktoken")
        path.write_bytes(load_tokenizer().rank_file)
        tokenizer = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {})
    return _encode_in_memory(source, partial(tokenizer.encode_batch, parallel=True))


def _encode_in_memory(source: Path, encode: Callable[[list[str]], Any]) -> Done:
    texts = list(read_texts(source))
    started = time.perf_counter()
    encoded = encode(texts)
    seconds = time.perf_counter() - started
    start = np.array([END_OF_TEXT], dtype=np.uint16)
    pieces = (piece for ids in encoded for piece in (start, np.asarray(ids, dtype=np.uint16)))
    return lambda: np.concatenate(list(pieces)), seconds


CONTENDERS: dict[str, Callable[[Path, Path], Done]] = {
    _OURS: ours,
    "pool of tiktoken, one array": pool_of_tiktoken,
    "datasets.map of tiktoken": datasets_map,
    "tiktoken alone, in memory": bare_tiktoken,
    "gigatoken alone, in memory": bare_gigatoken,
}


# --- measuring


def run_contender(name: str, source: Path, scratch: Path, *, watch_memory: bool = False) -> Measured:
    """Measure a contender in one process, then hash its tokens. ``watch_memory`` makes the contender slower."""
    command = [sys.executable, "-m", "benchmarks.data", "--contender", name, "--input", str(source)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        os.sync()  # so that the contender does not wait for earlier writes
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--out", str(Path(folder, "out"))],
            cwd=REPOSITORY,
            env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        with ThreadPoolExecutor(1) as pool:
            is_done = threading.Event()
            peak = pool.submit(_watch_peak_mb, process.pid, is_done) if watch_memory else None
            done = process.stdout.readline()  # the process prints a line after the work and before hashing
            seconds = time.perf_counter() - started
            is_done.set()
        result = process.stdout.readline()
        if process.wait() or not result:
            raise SystemExit(f"{name} on {source.name} failed")
    own_seconds, value = json.loads(done)["seconds"], json.loads(result)
    rows = own_seconds if isinstance(own_seconds, dict) else {name: own_seconds or seconds}
    return Measured(rows, peak.result() if peak else None, value["sha256"])


def _watch_peak_mb(pid: int, is_done: threading.Event) -> float:
    """Until the event, watch the proportional set sizes of a process and its children. Return the largest sum."""
    main, peak_bytes = psutil.Process(pid), 0
    while not is_done.wait(_POLL_S):
        with suppress(psutil.Error):  # a process may have just ended
            processes = (main, *main.children(recursive=True))
            peak_bytes = max(peak_bytes, sum(process.memory_full_info().pss for process in processes))
    return peak_bytes / 1e6


def be_contender(name: str, source: Path, out: Path) -> None:
    """Run a contender in this process. Print its time and the hash of its tokens."""
    read_back, seconds = CONTENDERS[name](source, out)
    print(json.dumps({"seconds": seconds}), flush=True)
    tokens = read_back()
    print(json.dumps({"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}), flush=True)


def compare(inputs: dict[str, Path], megabytes: float, rounds: int, against: Sequence[str], scratch: Path) -> bool:
    """Print one table per input format. Returns whether all ids are identical."""
    hashes = set()
    for kind, source in inputs.items():
        print()
        print_header(f"{kind}, {megabytes:.0f} MB of text", "s", "MB/s", "spread", "time relative to this project")
        seconds_of: dict[str, list[float]] = {}
        for _ in range(rounds):  # contenders take turns, so that a slow moment affects all of them
            for name in (_OURS, *against):
                measured = run_contender(name, source, scratch)
                hashes.add(measured.sha256)
                for row, row_seconds in measured.seconds.items():
                    seconds_of.setdefault(row, []).append(row_seconds)
        medians = {row: statistics.median(seconds) for row, seconds in seconds_of.items()}
        for row, median in medians.items():
            spread = (max(seconds_of[row]) - min(seconds_of[row])) / median
            print_row(
                row, f"{median:.2f}", f"{megabytes / median:.1f}", f"{spread:.0%}", f"{median / medians[_OURS]:.2f}"
            )
    print(f"\nidentical ids in all contenders: {'yes' if len(hashes) == 1 else 'NO'}")
    return len(hashes) == 1


def print_memory(sizes: Sequence[float], scratch: Path) -> None:
    print()
    print_header("input", "peak MB, all processes")
    for megabytes in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            source = write_inputs(Path(folder), megabytes)["jsonl"]
            measured = run_contender(_OURS, source, scratch, watch_memory=True)
            print_row(f"{megabytes:.0f} MB", f"{measured.peak_mb:.0f}")


def main() -> None:
    """Exit with a non-zero status if ids differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=400, help="size of the documents (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
    others = [name for name in CONTENDERS if name != _OURS]
    parser.add_argument(
        "--against",
        nargs="*",
        choices=others,
        default=others,
        metavar="NAME",
        help=f"contenders to compare with: {', '.join(others)} (default: all)",
    )
    parser.add_argument("--memory-megabytes", nargs="*", type=float, default=[50, 250, 1000], metavar="MB")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        be_contender(arguments.contender, arguments.input, arguments.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{available_cores()} cores, {arguments.rounds} rounds", flush=True)
        inputs = write_inputs(Path(scratch), arguments.megabytes)
        identical = compare(inputs, arguments.megabytes, arguments.rounds, arguments.against, Path(scratch))
        print_memory(arguments.memory_megabytes, Path(scratch))
    raise SystemExit(0 if identical else "ids differ")


if __name__ == "__main__":
    main()
