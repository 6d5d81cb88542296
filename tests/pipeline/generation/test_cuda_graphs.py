"""A replayed decoding step computes what the step itself computes.

On a CPU, a stand-in for CUDA graphs records the operations of torch and repeats them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeline.generation import cuda_graphs
from pipeline.generation.cuda_graphs import CudaGraphRecorder, Recorder
from pipeline.generation.generate import Decoder
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import VOCAB_SIZE, randomised_model, tiny_model_config

TEXTS = [[5], [3, 1, 88, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8], [4, 88, 4, 88, 1]]


class Operations(TorchDispatchMode):
    """Records each operation of torch with its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs


def record_operations(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the operations of a function. Python code of the function has no effect on a replay, as in CUDA graphs."""
    with Operations() as operations:
        recorded = function()

    def replay() -> Tensor:
        computed: dict[int, Tensor] = {}  # by the id of the recorded tensor
        for operation, args, kwargs, outputs in operations.calls:
            inputs = tree_map_only(Tensor, lambda tensor: computed.get(id(tensor), tensor), (args, kwargs))
            results = operation(*inputs[0], **inputs[1])
            for old, new in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                computed[id(old)] = new
        return computed[id(recorded)]

    return replay


def logits_of_texts(model: GPT2, recorder: Recorder | None, rows: int = 4) -> list[Tensor]:
    """Return the logits of each token of ``TEXTS``, which grow beyond the context, and of which two end early."""
    decoder = Decoder(model)
    decoder.recorder = recorder
    logits = []
    for cached_rows in (rows, rows, rows + 1):  # only the last batch of texts needs a new cache and new recordings
        decoder.start(cached_rows, 40)
        texts = [list(text) for text in TEXTS[:rows]]
        for step in range(25):
            logits.append(decoder.next_token_logits(texts))
            for text in texts:
                text.append((step * 31 + len(text)) % VOCAB_SIZE)
            if rows > 1 and (kept := {0: [0, 2, 1], 3: [1, 0]}.get(step)):
                decoder.keep(kept)
                texts = [texts[row] for row in kept]
    return logits


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("reset_positions_at", [None, 88])
def test_replays_compute_what_the_step_computes(
    monkeypatch: pytest.MonkeyPatch, rows: int, reset_positions_at: int | None
) -> None:
    """Rows have different lengths, two of them end, windows move, and attention reads 4, 8 and 12 slots.

    With three texts, a row of the recording for four rows is unused.
    """
    monkeypatch.setattr(cuda_graphs, "LEAST_SLOTS", 4)
    model = randomised_model(tiny_model_config(reset_positions_at=reset_positions_at)).eval()
    recordings = 0

    def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal recordings
        recordings += 1
        return record_operations(function)

    found, expected = logits_of_texts(model, record, rows), logits_of_texts(model, None, rows)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert recordings == 6, "each number of slots, or of rows and slots, is recorded once per cache"


def test_if_the_capture_fails_generation_continues(caplog: pytest.LogCaptureFixture) -> None:
    model = randomised_model(tiny_model_config()).eval()

    def refuse(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        found = logits_of_texts(model, refuse)
    torch.testing.assert_close(found, logits_of_texts(model, None))
    assert caplog.text.count("the capture failed: operation not permitted") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reset_positions_at", [None, 88])
def test_cuda_graphs_compute_what_the_step_computes(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpu: torch.device,
    rows: int,
    dtype: torch.dtype,
    reset_positions_at: int | None,
) -> None:
    """The heads have the size of GPT-2's, for which attention has a fused kernel."""
    monkeypatch.setattr(cuda_graphs, "LEAST_SLOTS", 8)
    config = tiny_model_config(n_embd=192, context_length=24, reset_positions_at=reset_positions_at)
    model = randomised_model(config).eval().to(gpu, dtype)
    recorder = Decoder(model).recorder
    assert isinstance(recorder, CudaGraphRecorder)
    with caplog.at_level(logging.WARNING):
        found = torch.cat(logits_of_texts(model, recorder, rows))
    assert "capture failed" not in caplog.text
    expected = torch.cat(logits_of_texts(model, None, rows))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.gpu
def test_after_a_failed_capture_the_gpu_generates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: torch.device
) -> None:
    """The CPU cannot wait for the GPU in a capture."""
    model = randomised_model(tiny_model_config()).eval().to(gpu)
    expected = logits_of_texts(model, None)
    decode = model.decode

    def decode_and_wait(*inputs: Any, **options: Any) -> Tensor:
        logits = decode(*inputs, **options)
        assert logits.isfinite().all().item()
        return logits

    monkeypatch.setattr(model, "decode", decode_and_wait)
    with caplog.at_level(logging.WARNING):
        found = logits_of_texts(model, Decoder(model).recorder)
    assert caplog.text.count("capture failed") == 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
