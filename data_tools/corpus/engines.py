"""What runs chunks: processes of this machine, or a Ray cluster. The result is the same."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from data_tools.corpus.chunks import Chunk, Report
from data_tools.corpus.parallel import unordered_map
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker import Job
from data_tools.errors import DataError
from data_tools.threads import available_cores

Result = TypeVar("Result")
#: ``work(job, chunk, report)`` as ``data_tools.corpus.worker`` has it.
ChunkWork = Callable[[Job, Chunk, Report], Result]

_RAY_RETRIES = 3
#: Chunks given to a cluster ahead of those that have ended; the rest waits here.
_RAY_IN_FLIGHT = 1000
_REACHABLE_S = 10.0


def run_chunks(
    work: ChunkWork[Result], job: Job, chunks: Iterable[Chunk], on_report: Report
) -> Generator[Result, None, None]:
    """Yield the result of each chunk, as they end; closing the generator stops the others.

    Raises:
        DataError: a chunk failed, or what runs it died again and again.
    """
    chunks = list(chunks)
    if job.request.engine == "ray":
        yield from _run_on_ray(work, job, chunks, on_report)
    else:
        workers = min(workers_of(job.request), max(len(chunks), 1))
        yield from unordered_map(partial(work, job), chunks, workers, on_report, preload=("data_tools.corpus.worker",))


def workers_of(request: TokenizeRequest) -> int:
    """Processes on this machine."""
    return request.workers or available_cores()


def _run_on_ray(
    work: ChunkWork[Result], job: Job, chunks: list[Chunk], on_report: Report
) -> Generator[Result, None, None]:
    """Each chunk is a Ray task on one core; Ray repeats those whose worker or machine died."""
    with _ray_cluster(job.request) as ray:

        def work_quietly(job: Job, chunk: Chunk) -> tuple[Result | None, DataError | None]:
            try:
                return work(job, chunk, lambda *_: None), None
            except DataError as error:
                return None, error

        remote = ray.remote(num_cpus=1, max_retries=_RAY_RETRIES)(work_quietly)
        waiting = iter(chunks)
        pending = [remote.remote(job, chunk) for chunk in islice(waiting, _RAY_IN_FLIGHT)]
        while pending:
            (done, *_), pending = ray.wait(pending, num_returns=1)
            pending += [remote.remote(job, chunk) for chunk in islice(waiting, 1)]
            result, error = _get(ray, done)
            if error is not None:
                raise error
            for shard in getattr(result, "shards", ()):
                on_report(shard.documents, shard.tokens, shard.utf8_bytes)
            yield result


def _get(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"--engine ray: a chunk failed {_RAY_RETRIES + 1} times ({type(error).__name__}: {reason}); "
            "repeat the command to continue"
        ) from error


@contextmanager
def _ray_cluster(request: TokenizeRequest) -> Generator[Any, None, None]:
    """The cluster at the address, or one of this machine's cores; left afterwards."""
    # Imported here: it is an extra, and takes a second.
    try:
        import ray
    except ImportError as error:
        raise DataError("--engine ray needs Ray: pip install 'gpt2-pipeline[cluster]'") from error
    if request.ray_address is not None:
        _expect_reachable(request.ray_address)
    address = request.ray_address or "local"  # which starts one, whatever else runs on this machine
    cores = {} if request.ray_address else {"num_cpus": workers_of(request)}
    try:
        ray.init(address, **cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"--engine ray: cannot join or start a cluster at {address} ({reason})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _expect_reachable(address: str) -> None:
    """Refuse at once what Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", which Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=_REACHABLE_S).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"--ray-address {address}: cannot be reached ({error}); is a Ray cluster there?") from error
