"""Report an error of this rank to the other ranks, and find the lost rank that caused it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import DistError

from data_tools.errors import UserError, describe_error
from pipeline.distributed.error_messages import LESS_MEMORY, report
from pipeline.distributed.flight_recorder import report_collectives
from pipeline.distributed.lost_ranks import find_lost, publish_failure
from pipeline.distributed.world import World
from pipeline.errors import LostRankError

#: What gloo's errors contain if a connection has broken.
_BROKEN_CONNECTION = (
    *map(os.strerror, (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNABORTED)),
    *map(os.strerror, (errno.ECONNRESET, errno.EPIPE)),
    "Connection closed by peer",
)
_CURE = "run the same command again (training continues from the last checkpoint)"
_LESS_HOST_MEMORY = (
    "Raise the memory limit of the job or container, start fewer ranks per host, or use a backend without offload."
)


@contextmanager
def failures_reported(world: World) -> Iterator[None]:
    """Return a context manager that prints an error of its block, and reports it to the other ranks.

    The error is printed before any cleanup code runs, because cleanup may wait for the other ranks.

    Raises:
        LostRankError: a collective failed because another rank is lost.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if world.size == 1 or world.ending.has_failed:  # an inner block has reported the error
            raise
        world.ending.has_failed = True
        if _may_come_from_a_collective(error) and (lost := _find_cause(error, world)):
            lost_rank = lost_rank_error(lost, world)
            report(lost_rank)
            raise lost_rank from error
        report(error)
        if isinstance(error, UserError):
            if not error.is_known_to_all:
                publish_failure(world, str(error))
        elif not isinstance(error, KeyboardInterrupt):
            publish_failure(world, describe_error(error))
        raise


@contextmanager
def timeouts_recorded(world: World, flight_records: Path | None) -> Iterator[None]:
    """Return a context manager that saves the flight recorder if a collective in its block times out."""
    try:
        yield
    except Exception as error:
        if _may_come_from_a_collective(error) and "timed out" in str(error).lower():
            report_collectives(flight_records, world.rank)
        raise


def lost_rank_error(reason: str, world: World) -> LostRankError:
    """Return the error that ends this rank. It also says whether the kernel has killed processes of this host."""
    if kills := world.ending.memory_kills.describe():
        advice = LESS_MEMORY if world.device.type == "cpu" else _LESS_HOST_MEMORY
        reason = f"{reason}; {kills}. {advice} Then"
    else:
        reason += ";"
    return LostRankError(f"{reason} {_CURE}")


def _find_cause(error: BaseException, world: World) -> str | None:
    """Return which ranks are lost, or that the network broke a connection although all ranks are alive, or None."""
    lost = find_lost(world)
    if lost is None and any(reason in str(error) for reason in _BROKEN_CONNECTION):
        lost = f"the network broke a connection between ranks ({describe_error(error)})"
        publish_failure(world, lost)
    return lost


def _may_come_from_a_collective(error: BaseException) -> bool:
    return type(error) is RuntimeError or isinstance(error, DistError)  # other errors are subclasses of RuntimeError
