"""The predictions of ``make scaling``, compared with arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling.__main__ import MODEL, PAYLOAD, predict, write_config

LINK = {"bytes_per_s": 1e9, "latency_s": 0.0, "straggler_s": 0.01}
INPUTS = {"ddp_pass_s": 0.3, "fsdp_pass_s": 0.32, "update_s": 0.04, "link": LINK}
CHANNELS, CONTEXT = MODEL["n_embd"], MODEL["context_length"]
BLOCK = 12 * CHANNELS**2 + 13 * CHANNELS
WEIGHTS = MODEL["n_layer"] * BLOCK + (MODEL["vocab_size"] + CONTEXT) * CHANNELS + 2 * CHANNELS


def predicted(folder: Path, backend: str, processes: int, limit: int | None = None) -> tuple[float, int]:
    config = write_config(folder / "config.json", processes)
    return predict(backend, config, processes, INPUTS, limit)


def test_one_process_computes(tmp_path: Path) -> None:
    assert predicted(tmp_path, "ddp", 1) == (pytest.approx(0.34), 0)


def test_processes_of_one_machine_compute_and_then_send(tmp_path: Path) -> None:
    """Four processes: 2 x 3/4 of the gradients. FSDP2 gathers blocks twice, and each rank updates a quarter.

    DDP waits once for the slowest rank. FSDP2 waits when it gathers a block (8 times) or the root (once), and when it
    reduces their gradients (5 times).
    """
    sent = 1.5 * 4 * WEIGHTS
    assert predicted(tmp_path, "ddp", 4) == (pytest.approx(0.34 + 0.01 + sent / 1e9), round(sent))
    sent = 0.75 * 4 * (2 * WEIGHTS + MODEL["n_layer"] * BLOCK)
    assert predicted(tmp_path, "fsdp", 4) == (pytest.approx(0.33 + 0.14 + sent / 1e9), round(sent))


def test_a_slow_link_overlaps_with_the_backward_pass_of_ddp(tmp_path: Path) -> None:
    """On a slow link, DDP sends from the end of the third block on. FSDP2 waits for each collective."""
    rate = PAYLOAD * 50e6 / 8
    computes, sent = predicted(tmp_path, "ddp", 2)[0], 4 * WEIGHTS
    seconds, planned = predicted(tmp_path, "ddp", 2, 50)
    assert planned == sent
    assert 0.04 + sent / rate < seconds < computes + sent / rate
    seconds, sent = predicted(tmp_path, "fsdp", 2, 50)
    assert seconds == pytest.approx(0.34 + 0.14 + sent / rate)
