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

TEXTS = [[5], [3, 1, 88, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8]]


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


def logits_of_texts(model: GPT2, recorder: Recorder | None, rows: int = 3) -> list[Tensor]:
    """Return the logits of each token of ``TEXTS``, which grow beyond the context, and of which one ends early."""
    decoder = Decoder(model)
    decoder.recorder = recorder
    logits = []
    for _ in range(2):  # the second batch of texts uses the recordings of the first one
        decoder.start(rows, 40)
        texts = [list(text) for text in TEXTS[:rows]]
        for step in range(25):
            logits.append(decoder.next_token_logits(texts))
            for text in texts:
                text.append((step * 31 + len(text)) % VOCAB_SIZE)
            if step == 3 and rows > 1:
                decoder.keep([0, 2])
                del texts[1]
    return logits


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("reset_positions_at", [None, 88])
def test_replays_compute_what_the_step_computes(
    monkeypatch: pytest.MonkeyPatch, rows: int, reset_positions_at: int | None
) -> None:
    """Rows have different lengths, one of them ends, windows move, and attention reads 4, 8 and 12 slots."""
    monkeypatch.setattr(cuda_graphs, "LEAST_SLOTS", 4)
    model = randomised_model(tiny_model_config(reset_positions_at=reset_positions_at)).eval()
    recordings = 0

    def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal recordings
        recordings += 1
        return record_operations(function)

    found, expected = logits_of_texts(model, record, rows), logits_of_texts(model, None, rows)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert recordings == 3, "each number of slots, or of rows and slots, is recorded once"


def test_if_the_capture_fails_generation_continues(caplog: pytest.LogCaptureFixture) -> None:
    model = randomised_model(tiny_model_config()).eval()

    def refuse(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        found = logits_of_texts(model, refuse)
    torch.testing.assert_close(found, logits_of_texts(model, None))
    assert caplog.text.count("the capture failed: operation not permitted") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
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
