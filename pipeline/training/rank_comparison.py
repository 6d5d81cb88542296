"""Compare the step times of all ranks. Log a slow rank, or a slow network between hosts."""

import logging
import socket
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.links import describe_links, measure_links
from pipeline.distributed.step_clock import StepClock, StepTimes
from pipeline.distributed.world import World
from pipeline.hardware.device import copy_to

log = logging.getLogger(__name__)

_KINDS = ("compute", "data_wait", "collective_wait")
#: A slow rank is logged if it is slow in this many consecutive rows. A single row may be noise.
_SLOW_ROWS = 3
#: The network is slow if every rank waits in collectives for more than this share of a step.
_LONG_WAIT_SHARE = 0.5
#: The links are measured again if all ranks wait this many times as long as at the last measurement.
_NOTABLE_INCREASE = 2.0


class RankComparison:
    """Compares the step times of the ranks since the previous row of metrics. Every rank must create this object.

    Args:
        slow_ratio: a rank is slow if its time for compute and data wait is more than ``slow_ratio`` times the mean of
            the other ranks. If None, nothing is logged about slow ranks and slow links.
    """

    def __init__(self, clock: StepClock, world: World, slow_ratio: float | None) -> None:
        self._clock = clock
        self._world = world
        self._slow_ratio = slow_ratio
        self._hosts: list[str] = world.gather(socket.gethostname())
        self._times: Tensor | None = None  # (ranks, 3) seconds, the times of all ranks
        self._slow_rank: int | None = None  # the rank that was slow in the previous row
        self._slow_rows = 0  # the number of consecutive rows in which this rank was slow
        self._shortest_wait_s = 0.0  # the collective wait of the rank that waited least, in the previous row
        self._step_s = 0.0  # the time of a step in the previous row
        self._measured_wait_s = 0.0  # the shortest wait when the links were measured

    def start(self) -> None:
        """Start to collect the times of all ranks. Every rank must call this before ``read``.

        The call does not wait for a GPU.
        """
        if self._world.size == 1 or not self._clock.is_active:
            return
        times = self._clock.read() or StepTimes()
        own = torch.zeros(self._world.size, len(_KINDS))  # the other ranks fill the other rows
        own[self._world.rank] = torch.tensor([times.compute_s, times.data_wait_s, times.collective_wait_s])
        self._times = self._world.sum(copy_to(own, self._world.device))

    def read(self) -> dict[str, Any]:
        """Return metrics from the times that ``start`` has collected.

        If a rank was slow in several consecutive rows of metrics, log this rank. Synchronize the device before this
        call. The result is empty if the run has only one rank, if the clock measures nothing, or if a rank has measured
        no step yet.
        """
        times = [] if self._times is None else self._times.tolist()
        if not times or not all(compute_s for compute_s, *_ in times):
            return {}
        row: dict[str, Any] = {}
        for kind, seconds in zip(_KINDS, zip(*times, strict=True), strict=True):
            row[f"{kind}_ms_min"] = 1e3 * min(seconds)
            row[f"{kind}_ms_mean"] = 1e3 * sum(seconds) / len(seconds)
            row[f"{kind}_ms_max"] = 1e3 * max(seconds)
        self._shortest_wait_s, self._step_s = min(wait_s for *_, wait_s in times), max(map(sum, times))
        rank, ratio = find_slowest([compute_s + data_wait_s for compute_s, data_wait_s, _ in times])
        if self._world.is_main:
            self._log(rank, ratio, times[rank])
        return {**row, "slowest_rank": rank, "slowest_host": self._hosts[rank], "slowest_ratio": ratio}

    def finds_slow_network(self) -> bool:
        """Return whether the ranks are on several hosts, and all ranks waited long in collectives.

        All ranks get the same result, which is based on the last call of ``read``. After a call of ``log_links``, the
        result is False until the ranks wait notably longer than they did at that call.
        """
        if self._slow_ratio is None or len(set(self._hosts)) == 1:
            return False
        limit_s = max(_LONG_WAIT_SHARE * self._step_s, _NOTABLE_INCREASE * self._measured_wait_s)
        return self._shortest_wait_s > limit_s

    def log_links(self) -> None:
        """Measure the links between the hosts, and log which links are slow. Every rank must call this.

        If all links of one host are slow, the message names the host. Otherwise, it names the slowest link.
        """
        self._measured_wait_s = self._shortest_wait_s
        links = measure_links(self._world, self._hosts)
        if self._world.is_main:
            log.warning(
                "%s; all ranks wait at least %.0f ms per step for collectives",
                describe_links(links, self._hosts),
                1e3 * self._measured_wait_s,
            )

    def _log(self, rank: int, ratio: float, times: list[float]) -> None:
        """Log one line when a rank has been slow for ``_SLOW_ROWS`` rows. While it stays slow, do not log it again."""
        slow_rank = rank if self._slow_ratio is not None and ratio > self._slow_ratio else None
        self._slow_rows = self._slow_rows + 1 if slow_rank == self._slow_rank else 1
        self._slow_rank = slow_rank
        if slow_rank is not None and self._slow_rows == _SLOW_ROWS:
            log.warning(
                "slow rank: rank %d on %s needs %.2f times as long as the other ranks (%.0f ms compute, %.0f ms data "
                "wait per step)",
                rank,
                self._hosts[rank],
                ratio,
                1e3 * times[0],
                1e3 * times[1],
            )


def find_slowest(own_s: list[float]) -> tuple[int, float]:
    """Return the slowest rank, and its time divided by the mean time of the other ranks.

    Args:
        own_s: each rank's seconds per step, without waits for other ranks. At least two values, all above 0.
    """
    rank = max(range(len(own_s)), key=own_s.__getitem__)
    others_s = (sum(own_s) - own_s[rank]) / (len(own_s) - 1)
    return rank, own_s[rank] / others_s
