"""The plan of a micro-batch counts what the real model keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pipeline.planning.activations as activations
from pipeline.model import blocked_loss
from pipeline.model.gpt2 import GPT2, CausalSelfAttention
from pipeline.planning.activations import Compute, LiveBytes, Peak, Request, trace_activations
from tests.pipeline.conftest import tiny_model_config


def request(compute: Compute = "autocast", precision: str = "amp_bf16", batch: int = 2, **model: Any) -> Request:
    return Request(tiny_model_config(**model), compute, precision, batch, 12)


def peak_bytes(planned: Request) -> int:
    activations.trace_activations.cache_clear()
    return max(peak.activation_bytes + peak.logit_bytes for peak in trace_activations(planned))


def largest_by_gradient(peaks: Iterable[Peak]) -> dict[int, int]:
    """Return the bytes of the largest peak by the number of elements with finished gradients."""
    largest: dict[int, int] = {}
    for peak in peaks:
        size = peak.activation_bytes + peak.logit_bytes
        largest[peak.finished_elements] = max(size, largest.get(peak.finished_elements, 0))
    return largest


class TestDepth:
    @pytest.mark.parametrize("recompute", [False, True, 2])
    @pytest.mark.parametrize(
        ("compute", "precision"), [("autocast", "amp_bf16"), ("bf16_view", "bf16"), ("bf16_weights", "bf16")]
    )
    def test_a_deep_model_is_not_traced_whole_and_has_the_same_peaks(
        self, compute: Compute, precision: str, recompute: bool | int
    ) -> None:
        deep = request(compute, precision, n_layer=9, activation_checkpointing=recompute)
        whole, planned = largest_by_gradient(activations._trace(deep)), largest_by_gradient(trace_activations(deep))
        assert len(planned) < len(whole)
        assert all(whole[finished] == size for finished, size in planned.items())
        assert max(planned.values()) == max(whole.values())


class TestWhatIsFollowed:
    def test_more_sequences_need_more(self) -> None:
        assert peak_bytes(request(batch=8)) > 1.5 * peak_bytes(request(batch=4))

    def test_recomputed_blocks_keep_less(self) -> None:
        none, half, whole = (
            peak_bytes(request(n_layer=6, batch=16, activation_checkpointing=n)) for n in (False, 2, 1)
        )
        assert whole < half < none

    def test_another_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An explicit softmax keeps (B, H, T, T), and the plan counts it."""
        before = peak_bytes(request(batch=16, n_layer=3))

        def written_out(self: CausalSelfAttention, x: Tensor, attend: None) -> Tensor:
            B, T, C = x.shape
            q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
            y = F.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
            return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

        monkeypatch.setattr(CausalSelfAttention, "forward", written_out)
        assert peak_bytes(request(batch=16, n_layer=3)) > before

    def test_a_loss_in_blocks_keeps_no_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The vocabulary has 128 columns with padding, and a block has 24."""
        monkeypatch.setattr(blocked_loss, "BLOCK_COLUMNS", 24)
        whole = request(batch=16)
        blocked = replace(whole, loss_in_blocks=True)
        logits = {planned: max(peak.logit_bytes for peak in trace_activations(planned)) for planned in (whole, blocked)}
        assert logits[blocked] == blocked_loss.bytes_of_a_block(16 * 12, 128, 2)
        assert logits[blocked] < logits[whole] / 2
        assert peak_bytes(blocked) < peak_bytes(whole)

    def test_a_loss_that_is_whole_logits_or_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = peak_bytes(request(batch=16))
        monkeypatch.setattr(GPT2, "loss", lambda self, tokens, targets: self.hidden_states(tokens).float().sum())
        assert peak_bytes(request(batch=16)) < before


class TestLiveBytes:
    def test_freed_and_ignored_tensors_are_not_counted(self) -> None:
        with LiveBytes() as live:
            kept = torch.zeros(10)
            gone = torch.zeros(100)
            assert live.total == 440
            del gone
            assert live.total == 40
            view = kept.view(2, 5)
            assert live.total == 40
            live.ignore([view])
            assert live.total == 0
            del kept, view
        assert live.total == 0
