"""Count the requests and bytes of the upload of one checkpoint to an S3 server on this machine.

The checkpoint has the same files and sizes as a real checkpoint with AdamW's state. The content is random.
"""

import argparse
import hashlib
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from data_tools.storage.atomic import write_json_durably
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.layout import MANIFEST_FILE, STATE_FILE, checkpoint_folder, tensor_file
from pipeline.checkpoint.manifest import CheckpointManifest, FileEntry
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.remote_run import RemoteRun
from pipeline.checkpoint.state import StateFile
from pipeline.distributed.world import World
from tests.support.s3_server import s3_server

URL = "s3://bucket/run"
_CHUNK_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=124_475_904, help="default: GPT-2 124M with padding rows")
    parser.add_argument("--ranks", type=int, default=2, help="the ranks that wrote the checkpoint")
    arguments = parser.parse_args()
    with s3_server() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment)
        write_checkpoint(Path(folder), arguments.parameters, arguments.ranks)
        RemoteRun(URL).write_metrics(b"")  # the client asks twice if a URL is empty
        server.requests.clear()
        received, sent = server.received, server.sent
        mirror = Mirror(URL, Path(folder), World(0, 1, 0, torch.device("cpu")), keep_last=2, timeout_s=600)
        mirror.start()
        (outcome,) = mirror.finish(lambda: None)
        print(outcome.problem or f"uploaded and read back {outcome.bytes:,} bytes in {outcome.seconds:.1f} s")
        print("requests: " + ", ".join(f"{method} {count}" for method, count in sorted(server.requests.items())))
        print(f"bytes to the server {server.received - received:,}, from the server {server.sent - sent:,}")


def write_checkpoint(run_folder: Path, parameters: int, ranks: int) -> None:
    """Write files with the names and sizes of a checkpoint, and their manifest."""
    folder = checkpoint_folder(run_folder, 1)
    folder.mkdir(parents=True)
    for rank in range(ranks):
        elements = parameters * (rank + 1) // ranks - parameters * rank // ranks
        for group, size in (("weights", 4 * elements), ("moments", 8 * elements)):
            write_random(folder / tensor_file(rank, group), size)
    state = StateFile(1, 1, 1, 1, None, 0, 0, world_size=ranks, versions={}, config={})
    write_json_durably(folder / STATE_FILE, asdict(state))
    files = {path.name: FileEntry(path.stat().st_size, sha256_of_file(path)) for path in sorted(folder.iterdir())}
    write_json_durably(folder / MANIFEST_FILE, CheckpointManifest({}, {}, files).to_json())


def write_random(path: Path, size: int) -> None:
    """Write a file whose content depends on its name."""
    with path.open("wb") as file:
        for start in range(0, size, _CHUNK_BYTES):
            seed = hashlib.sha256(f"{path.name} {start}".encode()).digest()
            file.write((seed * (_CHUNK_BYTES // len(seed)))[: min(_CHUNK_BYTES, size - start)])


if __name__ == "__main__":
    main()
