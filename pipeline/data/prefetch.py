"""Reading ahead: the next step's micro-batches come from the disk while the current step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.data.loader import MicroBatch, TrainLoader


class Prefetcher:
    """Hands out the micro-batches of steps, and reads those of the step after in a thread of its own.

    One step ahead, so that memory stays at two steps of tokens. Of a jump it need not be told: when other samples
    are asked for than were read ahead, they are read there and then.
    """

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that follows ``consumed`` samples.

        Raises:
            DataError: they cannot be read; in the thread that asks for them, whichever tried.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == consumed else self._read(consumed)
        following = consumed + self._loader.plan.samples_per_step
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def close(self) -> None:
        """End the thread. What it has read ahead is dropped."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _read(self, consumed: int) -> list[MicroBatch]:
        batches = self._loader.micro_batches(consumed)
        if self._device.type != "cuda":
            return batches
        with torch.cuda.device(self._device):  # a thread begins on the first GPU
            return [batch.pinned() for batch in batches]
