"""Download a checkpoint from a URL into a run folder. The ranks share the work."""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.formatting import format_size
from data_tools.storage.atomic import hidden_partial_path, make_empty_folder, write_bytes_durably
from pipeline.checkpoint.layout import MANIFEST_FILE, checkpoint_folder
from pipeline.checkpoint.manifest import FileEntry, find_not_finite
from pipeline.checkpoint.pairing import pair
from pipeline.checkpoint.remote_run import RemoteCheckpoint, RemoteRun
from pipeline.checkpoint.saving import on_every_rank, on_main_rank, publish_checkpoint
from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import METRICS_FILE

log = logging.getLogger(__name__)

#: The size of one request. It is a multiple of the page size, so two hosts never write into the same page of a file.
BLOCK_BYTES = 32 << 20
REQUESTS = 4  # at the same time per rank


class DamagedAtUrlError(CheckpointError):
    """No run can resume from a checkpoint at a URL, because its files are damaged, or contain NaN."""


@dataclass(frozen=True)
class Block:
    """Bytes ``start`` to ``stop - 1`` of a file of a checkpoint."""

    file: str
    start: int
    stop: int


def download_checkpoint(checkpoint: RemoteCheckpoint, run_folder: Path, world: World) -> Path:
    """Download a checkpoint into a run folder that all ranks share, verify it, and return its new folder.

    Every rank must make this call. A damaged checkpoint of the same step in the run folder is replaced. If the run
    folder has no metrics, the metrics are downloaded too.

    Raises:
        DamagedAtUrlError: the downloaded files differ from the manifest, or contain NaN or infinite numbers. The run
            folder has not changed.
        CheckpointError: a rank could not read or write a file. The checkpoints in the run folder have not changed.
    """
    if problem := find_not_finite(checkpoint.manifest.files):
        raise DamagedAtUrlError(f"{checkpoint}: {problem}")
    started = time.perf_counter()
    folder = checkpoint_folder(run_folder, checkpoint.step)
    aside = hidden_partial_path(folder)
    try:
        on_main_rank(world, lambda: allocate(checkpoint.manifest.files, aside))
        own_bytes = on_every_rank(world, lambda: _download(checkpoint, aside, world))
        on_main_rank(world, lambda: write_bytes_durably(aside / MANIFEST_FILE, checkpoint.manifest_bytes))
        if problem := world.call_on_main(lambda: find_damage(aside)):
            raise DamagedAtUrlError(problem.replace(str(aside), str(checkpoint)))
        on_main_rank(world, lambda: _connect(run_folder, checkpoint.run))  # before the run folder has a checkpoint
        on_main_rank(world, lambda: publish_checkpoint(aside, folder))
    except CheckpointError as error:
        if world.is_main:
            _remove(aside)
        if isinstance(error, DamagedAtUrlError):
            raise
        raise CheckpointError(f"cannot download {checkpoint}: {error}") from None
    seconds, sizes = time.perf_counter() - started, world.gather(own_bytes)
    per_rank = ", ".join(f"rank {rank} {format_size(size)}" for rank, size in enumerate(sizes[:8]))
    log.info("downloaded %s in %.2f s, %s (%s)", checkpoint, seconds, format_size(sum(sizes)), per_rank)
    return folder


def share_of_blocks(checkpoint: RemoteCheckpoint, rank: int, size: int) -> list[Block]:
    """Return the blocks (ranges of bytes in files) that a rank downloads. ``size`` is the number of ranks."""
    blocks = [*blocks_of(checkpoint.manifest.files)]
    return blocks[len(blocks) * rank // size : len(blocks) * (rank + 1) // size]


def blocks_of(files: Mapping[str, FileEntry]) -> Iterator[Block]:
    """Divide files into blocks for the download. ``files`` maps each file name to its entry in the manifest."""
    for name, entry in files.items():
        for start in range(0, entry.bytes, BLOCK_BYTES):
            yield Block(name, start, min(start + BLOCK_BYTES, entry.bytes))


def allocate(files: Mapping[str, FileEntry], folder: Path) -> None:
    """Create or empty ``folder``. Then create the files of a checkpoint in ``folder``, with their final sizes.

    Raises OSError if the disk has too little free space.
    """
    make_empty_folder(folder)
    for name, entry in files.items():
        with (folder / name).open("wb") as file:
            if hasattr(os, "posix_fallocate") and entry.bytes:
                os.posix_fallocate(file.fileno(), 0, entry.bytes)


def _download(checkpoint: RemoteCheckpoint, aside: Path, world: World) -> int:
    blocks = share_of_blocks(checkpoint, world.rank, world.size)
    with ThreadPoolExecutor(REQUESTS) as threads:
        sizes = []
        for size in threads.map(lambda block: download_block(checkpoint, aside, block), blocks):
            world.progress.move()
            sizes.append(size)
    return sum(sizes)


def download_block(checkpoint: RemoteCheckpoint, folder: Path, block: Block) -> int:
    """Download a block, and write it at its position into a file in ``folder``. The file must exist.

    Return the number of downloaded bytes.
    """
    content = checkpoint.run.read_range(checkpoint.step, block.file, block.start, block.stop)
    with (folder / block.file).open("r+b") as file:
        file.seek(block.start)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content)


def _connect(run_folder: Path, run: RemoteRun) -> None:
    """Download the metrics if the run folder has none, and record that the URL belongs to the run."""
    path = run_folder / METRICS_FILE
    if not path.exists() and (content := run.read_metrics()) is not None:
        write_bytes_durably(path, content)
    pair(run_folder, run.url)


def _remove(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # not empty
        aside.parent.rmdir()
