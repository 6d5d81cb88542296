"""Process chunks in worker processes, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from data_tools.corpus.chunks import Chunk, ChunkRecord
from data_tools.corpus.parallel import Unfinished, finished, unordered_map
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker import Job, Report
from data_tools.corpus.worker_server import worker_modules, workers_of
from data_tools.errors import DataError, describe_error, install_command

Result = TypeVar("Result")
#: The functions ``encode_chunk`` or ``fingerprint_chunk`` of ``data_tools.corpus.worker``.
ChunkWork = Callable[[Job, Chunk, Report], Result | Unfinished[Result]]

_RAY_RETRIES = 3
#: The maximum number of chunks that the cluster has received but not finished.
_RAY_IN_FLIGHT = 1000
_REACHABLE_S = 10.0


def run_chunks(
    work: ChunkWork[Result], job: Job, chunks: Sequence[Chunk], on_report: Report
) -> Generator[Result, None, None]:
    """Process chunks in parallel. Yield the result of each chunk as soon as it is available.

    ``on_report`` receives the progress that ``work`` reports. Closing the generator stops the work.

    Raises:
        DataError: ``work`` raised it, or several workers died at the same chunk.
    """
    if job.request.engine == "ray":
        yield from _run_on_ray(work, job, chunks, on_report)
    else:
        workers = min(workers_of(job.request), max(len(chunks), 1))
        yield from unordered_map(partial(work, job), chunks, workers, on_report, preload=worker_modules(job.request))


def _run_on_ray(
    work: ChunkWork[Result], job: Job, chunks: Sequence[Chunk], on_report: Report
) -> Generator[Result, None, None]:
    with _ray_cluster(job.request) as ray:

        def run_chunk(chunk: Chunk) -> tuple[Result | None, DataError | None]:
            try:
                return finished(work(job, chunk, lambda progress: None)), None
            except DataError as error:
                return None, error

        remote = ray.remote(num_cpus=1, max_retries=_RAY_RETRIES)(run_chunk)
        waiting = iter(chunks)
        pending = [remote.remote(chunk) for chunk in islice(waiting, _RAY_IN_FLIGHT)]
        while pending:
            (done, *_), pending = ray.wait(pending, num_returns=1)
            pending += [remote.remote(chunk) for chunk in islice(waiting, 1)]
            try:
                result, error = ray.get(done)
            except ray.exceptions.RayError as ray_error:
                raise DataError(
                    f"--engine ray: a chunk failed {_RAY_RETRIES + 1} times ({describe_error(ray_error)}); "
                    "repeat the command to continue"
                ) from ray_error
            if error is not None:
                raise error
            if isinstance(result, ChunkRecord):
                on_report(result.progress)
            yield result


@contextmanager
def _ray_cluster(request: TokenizeRequest) -> Iterator[Any]:
    """Yield the module ``ray``, connected to the request's cluster or to a new local cluster."""
    # Import Ray here, because it is optional and slow to import.
    try:
        import ray
    except ImportError as error:
        raise DataError(f"--engine ray needs Ray: {install_command('cluster')}") from error
    if request.ray_address is not None:
        _check_reachable(request.ray_address)
    address = request.ray_address or "local"  # "local" always starts a new cluster
    cores = {} if request.ray_address else {"num_cpus": workers_of(request)}
    try:
        ray.init(address, **cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DataError(
            f"--engine ray: cannot join or start a cluster at {address} ({describe_error(error)})"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise DataError if no server listens at the address. Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # for example "auto": Ray then finds the address
    try:
        socket.create_connection((host, int(port)), timeout=_REACHABLE_S).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"--ray-address {address}: cannot be reached ({error}); is a Ray cluster there?") from error
