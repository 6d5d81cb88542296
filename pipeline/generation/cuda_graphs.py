"""Replay the decoding step as a CUDA graph.

A decoding step of a small model consists of hundreds of short GPU operations. Starting them one by one takes longer
than their computation. A CUDA graph starts all of them at once.
"""

import logging
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from pipeline.model.key_value_cache import KeyValueCache

log = logging.getLogger(__name__)

WARM_UP_CALLS = 3  # as in torch's documentation
LEAST_SLOTS = 128  # shorter texts share one recording

#: (tokens, slots, seen) -> logits, see ``GPT2.decode``.
Step = Callable[[Tensor, Tensor, int], Tensor]
#: Records the operations of a function without arguments, which it may call several times. Returns a function that
#: repeats them on the same memory.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class ReplayedStep:
    """Decodes like ``GPT2.decode``. The first call with new shapes records the operations, and later calls repeat them.

    The number of rows and of slots is rounded up, so that few recordings are needed. If a recording fails, a warning is
    logged, and nothing is recorded from then on.
    """

    def __init__(self, step: Step, cache: KeyValueCache, record: Recorder) -> None:
        self._step = step
        self._cache = cache
        self._record: Recorder | None = record
        self._recordings: dict[tuple[int, int], _Recording] = {}  # by the number of rows and of slots

    @property
    def has_failed(self) -> bool:
        """Return whether a recording has failed."""
        return self._record is None

    def __call__(self, tokens: Tensor, slots: Tensor, seen: int) -> Tensor:
        """Return the logits. The next call overwrites them."""
        rows = min(next_power_of_2(len(tokens)), self._cache.rows)
        seen = min(max(next_power_of_2(seen), LEAST_SLOTS), self._cache.capacity)
        if self._record is not None and (rows, seen) not in self._recordings:
            try:
                self._recordings[rows, seen] = _Recording(self._step, tokens, slots, rows, seen, self._record)
            except RuntimeError as error:
                log.warning("generation continues without CUDA graphs, because the capture failed: %s", error)
                self._record = None
        recording = self._recordings.get((rows, seen))
        return self._step(tokens, slots, seen) if recording is None else recording(tokens, slots)


class _Recording:
    def __init__(self, step: Step, tokens: Tensor, slots: Tensor, rows: int, seen: int, record: Recorder) -> None:
        self._inputs = tokens.new_zeros(2, rows, 1)  # a replay reads the tokens and slots from this memory
        self._set_inputs(tokens, slots)  # before the recording, which also computes
        self._replay = record(lambda: step(self._inputs[0], self._inputs[1], seen))

    def __call__(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self._set_inputs(tokens, slots)
        return self._replay()[: len(tokens)]

    def _set_inputs(self, tokens: Tensor, slots: Tensor) -> None:
        self._inputs[0, : len(tokens)] = tokens
        self._inputs[1, : len(slots)] = slots


class CudaGraphRecorder:
    """Records functions as CUDA graphs. Graphs that exist at the same time share their memory.

    It must be called in inference mode.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if not self._graphs:  # torch can refuse a pool after the last graph in it was deleted
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # also restores the stream if the capture fails
            for _ in range(WARM_UP_CALLS):
                function()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = function()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << (number - 1).bit_length()
