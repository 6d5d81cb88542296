"""Read the next step's micro-batches from disk while the current step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.data.loader import MicroBatch, TrainLoader


class Prefetcher:
    """Returns the micro-batches of a step, and reads those of the next step in a thread.

    It reads one step ahead, so memory holds two steps of tokens. Seeks need no notification: samples that have not
    been read ahead are read when they are requested.
    """

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of the step that follows ``consumed`` samples.

        Raises:
            DataError: they cannot be read, now or by the thread.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == consumed else self._read(consumed)
        following = consumed + self._loader.plan.samples_per_step
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def close(self) -> None:
        """End the thread and drop what it has read."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _read(self, consumed: int) -> list[MicroBatch]:
        batches = self._loader.micro_batches(consumed)
        if self._device.type != "cuda":
            return batches
        with torch.cuda.device(self._device):  # a new thread starts on the first GPU
            return [batch.pinned() for batch in batches]
