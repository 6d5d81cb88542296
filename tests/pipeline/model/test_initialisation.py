"""A range of a parameter gets the values that a single draw of the whole parameter gives."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.model import initialisation
from pipeline.model.gpt2 import allocate_model, build_model
from pipeline.model.initialisation import INIT_STD, draw_elements
from pipeline.seeds import derive_seed
from tests.pipeline.conftest import tiny_model_config

SEED = 7


def drawn_at_once(name: str, shape: torch.Size, std: float) -> torch.Tensor:
    """Return all elements of a parameter from one call of ``normal_``."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, "weights", name))
    return torch.empty(shape.numel()).normal_(0.0, std, generator=generator)


@pytest.mark.parametrize("block", [16, 1 << 18])
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_ranges_are_slices_of_a_single_draw(monkeypatch: pytest.MonkeyPatch, block: int, ranks: int) -> None:
    """The sizes are odd, so that neither blocks nor groups of 16 values end where a parameter or a range ends."""
    monkeypatch.setattr(initialisation, "BLOCK_ELEMENTS", block)
    config = tiny_model_config(n_embd=27, vocab_size=89)
    for name, parameter in allocate_model(config, "meta").named_parameters():
        shape, count = parameter.shape, parameter.numel()
        if parameter.dim() == 1:
            expected = torch.full((count,), 0.0 if name.endswith("bias") else 1.0)
        else:
            residual = name.endswith("c_proj.weight")
            expected = drawn_at_once(name, shape, INIT_STD / math.sqrt(2 * config.n_layer) if residual else INIT_STD)
        if name == "wte.weight":
            expected[89 * 27 :] = 0.0
        share = -(-count // ranks)
        for start in range(0, count, share):
            target = torch.full((min(share, count - start),), math.nan)
            draw_elements(name, shape, config, SEED, start, target)
            assert torch.equal(target, expected[start : start + share]), (name, start)


def test_a_last_block_is_never_too_short_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "BLOCK_ELEMENTS", 32)
    for count in range(30, 140):
        target = torch.empty(count)
        shape = torch.Size([count, 1])
        draw_elements("wpe.weight", shape, tiny_model_config(), SEED, 0, target)
        assert torch.equal(target, drawn_at_once("wpe.weight", shape, INIT_STD)), count


@pytest.mark.parametrize("name", ["h.0.attn.q_norm.weight", "h.0.scale"])
def test_weights_with_one_dimension_are_one_under_any_name(name: str) -> None:
    target = torch.empty(4)
    draw_elements(name, torch.Size([4]), tiny_model_config(), SEED, 0, target)
    assert target.tolist() == [1.0] * 4


def test_a_built_model_has_these_values() -> None:
    config = tiny_model_config()
    for name, parameter in build_model(config, SEED).named_parameters():
        target = torch.empty(parameter.numel())
        draw_elements(name, parameter.shape, config, SEED, 0, target)
        assert torch.equal(parameter.detach().view(-1), target), name


def test_a_range_past_the_end_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(AssertionError, match="has 32 elements, and the range ends at 33"):
        draw_elements("wpe.weight", torch.Size([8, 4]), tiny_model_config(), SEED, 16, torch.empty(17))
