"""The model computes what GPT-2 computes, and has its size and its initial weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import MODEL_PRESETS, ModelConfig, Preset
from pipeline.model.gpt2 import (
    GPT2,
    allocate_model,
    build_model,
    flops_per_token,
    parameter_count,
)
from pipeline.model.output_layer import IGNORE_INDEX, padded_vocab_size
from tests.pipeline.conftest import VOCAB_SIZE, random_tokens, randomised_model, tiny_model_config

PUBLISHED_COUNTS: dict[Preset, int] = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def preset_config(preset: Preset) -> ModelConfig:
    return ModelConfig.model_validate({"preset": preset})


@pytest.fixture(scope="module")
def gpt2_124m() -> GPT2:
    """Return GPT-2 124M with the initial weights of training."""
    return build_model(preset_config("gpt2"), seed=1337).eval()


def shift(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT2, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestAgainstTransformers:
    """The GPT-2 of transformers computes the same with the same weights."""

    CONFIG = ModelConfig.model_validate(
        {"n_layer": 3, "n_head": 5, "n_embd": 35, "context_length": 23, "vocab_size": 50257}
    )

    @pytest.fixture(scope="class")
    def ours(self) -> GPT2:
        return randomised_model(self.CONFIG).eval()

    @pytest.fixture(scope="class")
    def theirs(self, ours: GPT2) -> Any:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=50257, n_positions=23, n_embd=35, n_layer=3, n_head=5, activation_function="gelu_new"
        )
        config._attn_implementation = "eager"  # plain matrix products and softmax
        model = transformers.GPT2LMHeadModel(config).eval()
        weights = {}
        for name, weight in ours.state_dict().items():
            if name in ("wte.weight", "lm_head.weight"):
                weight = weight[:50257]
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weight = weight.T  # Conv1D keeps (inputs, outputs)
            weights[name if name == "lm_head.weight" else f"transformer.{name}"] = weight.clone()
        model.load_state_dict(weights)
        return model

    def test_logits(self, ours: GPT2, theirs: Any) -> None:
        tokens = random_tokens(3, 23, vocab_size=50257)
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)

    def test_loss(self, ours: GPT2, theirs: Any) -> None:
        tokens = random_tokens(3, 22, vocab_size=50257)
        inputs, targets = shift(tokens)
        with torch.no_grad():
            mean = ours.loss(inputs, targets).item() / targets.numel()
            assert mean == pytest.approx(theirs(tokens, labels=tokens).loss.item(), abs=1e-5)

    def test_gradients(self, ours: GPT2, theirs: Any) -> None:
        tokens = random_tokens(2, 23, vocab_size=50257)
        inputs, targets = shift(tokens)
        found = gradients(ours, ours.loss(inputs, targets) / targets.numel())
        theirs.zero_grad()
        theirs(tokens, labels=tokens).loss.backward()
        expected = theirs.transformer
        torch.testing.assert_close(found["wte.weight"][:50257], expected.wte.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found["h.1.attn.c_attn.weight"], expected.h[1].attn.c_attn.weight.grad.T, rtol=1e-4, atol=1e-6
        )


class TestSize:
    @pytest.mark.parametrize("preset", PUBLISHED_COUNTS)
    def test_counts_are_the_published_ones(self, preset: Preset) -> None:
        assert parameter_count(preset_config(preset)) == PUBLISHED_COUNTS[preset]

    @pytest.mark.parametrize("preset", MODEL_PRESETS)
    def test_a_built_model_has_the_count_and_the_padding(self, preset: Preset) -> None:
        config = preset_config(preset)
        with torch.device("meta"):
            built = sum(parameter.numel() for parameter in GPT2(config).parameters())
        assert built == parameter_count(config, padded=True)
        assert built == parameter_count(config) + (50304 - 50257) * config.n_embd

    def test_flops_of_a_token(self) -> None:
        assert flops_per_token(preset_config("gpt2"), 1024) / 1e6 == pytest.approx(855.4, abs=0.05)

    @pytest.mark.parametrize(("vocab_size", "rows"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
    def test_vocabulary_is_rounded_up(self, vocab_size: int, rows: int) -> None:
        assert padded_vocab_size(vocab_size) == rows


class TestInitialWeights:
    def test_deviations(self, gpt2_124m: GPT2) -> None:
        for name, parameter in gpt2_124m.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                expected = 0.02 / math.sqrt(2 * 12) if name.endswith("c_proj.weight") else 0.02
                weights = parameter[:50257] if name == "wte.weight" else parameter
                assert weights.std().item() == pytest.approx(expected, rel=0.01), name
                assert abs(weights.mean().item()) < expected / 100, name

    def test_biases_are_zero_and_layer_norms_one(self, gpt2_124m: GPT2) -> None:
        flat = {name: parameter for name, parameter in gpt2_124m.named_parameters() if parameter.dim() == 1}
        assert {"h.0.ln_1.weight", "h.11.ln_2.weight", "ln_f.weight", "h.11.mlp.c_proj.bias"} <= flat.keys()
        for name, parameter in flat.items():
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name

    def test_initial_loss(self, gpt2_124m: GPT2) -> None:
        """The loss is ln V plus half the variance of the logits, which are sums of C products of 0.02 and 1."""
        inputs, targets = shift(random_tokens(4, 129, vocab_size=50257))
        with torch.no_grad():
            loss = gpt2_124m.loss(inputs, targets).item() / targets.numel()
        assert loss == pytest.approx(math.log(50257) + 768 * 0.02**2 / 2, abs=0.05)

    def test_initial_loss_of_a_narrow_model_is_ln_v(self) -> None:
        config = ModelConfig.model_validate({"n_layer": 12, "n_head": 12, "n_embd": 192, "context_length": 128})
        inputs, targets = shift(random_tokens(4, 129, vocab_size=50257))
        with torch.no_grad():
            loss = build_model(config, seed=1337).loss(inputs, targets).item() / targets.numel()
        assert loss == pytest.approx(math.log(50257), abs=0.1)

    def test_one_seed_one_model(self) -> None:
        torch.manual_seed(1)
        first = build_model(tiny_model_config(), seed=7)
        torch.manual_seed(2)  # the global random stream must not matter
        second = build_model(tiny_model_config(), seed=7)
        for name, parameter in first.named_parameters():
            assert torch.equal(parameter, second.get_parameter(name)), name

    def test_another_seed_another_model(self) -> None:
        first, second = (build_model(tiny_model_config(), seed=seed) for seed in (7, 8))
        drawn = [name for name, parameter in first.named_parameters() if parameter.dim() == 2]
        assert not any(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in drawn)

    def test_no_two_weights_share_a_random_stream(self) -> None:
        model = build_model(tiny_model_config(), seed=7)
        begins = [p.flatten()[:4] / p.flatten()[:4].norm() for p in model.parameters() if p.dim() == 2]
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(begins, 2))


def test_a_buffer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is created on the device meta, so the values of a buffer would be lost."""

    class Rotary(torch.nn.Identity):
        def __init__(self, config: ModelConfig, layer: int) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.arange(4.0))

    monkeypatch.setattr("pipeline.model.gpt2.Block", Rotary)
    with pytest.raises(AssertionError, match="a buffer would lose its values"):
        allocate_model(tiny_model_config(), "cpu")


class TestCalls:
    def test_a_call_with_tokens_returns_logits_and_with_targets_the_loss(self) -> None:
        model = build_model(tiny_model_config(), 1)
        tokens, targets = shift(random_tokens(2, 8))
        with torch.no_grad():
            assert torch.equal(model(tokens), model.logits(tokens))
            assert torch.equal(model(tokens, targets), model.loss(tokens, targets))

    def test_more_tokens_than_the_context_are_refused(self) -> None:
        config = tiny_model_config()
        tokens = random_tokens(1, config.context_length + 1)
        with pytest.raises(AssertionError, match=r"do not fit into the context_length"):
            build_model(config, 1)(tokens)


class TestTie:
    @pytest.mark.parametrize("make", [lambda c: build_model(c, 1), lambda c: allocate_model(c, "cpu"), GPT2])
    def test_the_tied_weight_is_one_parameter(self, make: Any) -> None:
        model = make(tiny_model_config())
        model.assert_tied()
        assert model.lm_head.weight is model.wte.weight
        names = [name for name, _ in model.named_parameters()]
        assert "wte.weight" in names
        assert "lm_head.weight" not in names

    def test_a_broken_tie_is_detected(self) -> None:
        model = build_model(tiny_model_config(), 1)
        model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach().clone())
        with pytest.raises(AssertionError, match="came apart"):
            model.assert_tied()


class TestPadding:
    """The padding rows of the vocabulary have no effect."""

    def test_logits_are_over_the_vocabulary(self) -> None:
        logits = build_model(tiny_model_config(), 1).logits(random_tokens(2, 7))
        assert logits.shape == (2, 7, VOCAB_SIZE)

    def test_padding_rows_start_at_zero_and_get_no_gradient(self) -> None:
        model = build_model(tiny_model_config(), 1)
        found = gradients(model, model.loss(*shift(random_tokens(2, 9))))["wte.weight"]
        assert found.shape[0] == 128
        assert (model.wte.weight[VOCAB_SIZE:] == 0).all()
        assert (found[VOCAB_SIZE:] == 0).all()
        assert (found[:VOCAB_SIZE] != 0).any(dim=1).all()

    def test_padding_rows_change_nothing(self) -> None:
        model = build_model(tiny_model_config(), 1)
        inputs, targets = shift(random_tokens(2, 9))
        before = model.logits(inputs), model.loss(inputs, targets)
        with torch.no_grad():
            model.wte.weight[VOCAB_SIZE:] = 1e3
        assert torch.equal(model.logits(inputs), before[0])
        assert torch.equal(model.loss(inputs, targets), before[1])


class TestForward:
    def test_a_later_token_does_not_change_earlier_logits(self) -> None:
        model = randomised_model(tiny_model_config()).eval()
        tokens = random_tokens(1, 12)
        for position in range(1, 12):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % VOCAB_SIZE
            before, after = model.logits(tokens), model.logits(changed)
            torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-5)
            assert not torch.allclose(before[:, position:], after[:, position:], atol=1e-2)

    def test_every_earlier_token_changes_the_logits(self) -> None:
        model = randomised_model(tiny_model_config()).eval()
        tokens = random_tokens(1, 12)
        for position in range(12):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % VOCAB_SIZE
            assert not torch.allclose(model.logits(tokens)[:, -1], model.logits(changed)[:, -1], atol=1e-3)

    def test_loss_is_the_sum_of_cross_entropies(self) -> None:
        model = randomised_model(tiny_model_config()).eval()
        inputs, targets = shift(random_tokens(3, 9))
        log_probabilities = F.log_softmax(model.logits(inputs).double(), dim=-1)
        expected = -log_probabilities.gather(-1, targets.unsqueeze(-1)).sum()
        assert model.loss(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)

    def test_ignored_targets_add_nothing(self) -> None:
        model = randomised_model(tiny_model_config()).eval()
        inputs, targets = shift(random_tokens(2, 9))
        masked = targets.clone()
        masked[0, 3:] = IGNORE_INDEX
        masked[1] = IGNORE_INDEX
        found, expected = model.loss(inputs, masked), model.loss(inputs[:1, :3], targets[:1, :3])
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        of_masked, of_short = gradients(model, found), gradients(model, expected)
        for name, gradient in of_masked.items():
            torch.testing.assert_close(gradient, of_short[name], rtol=1e-4, atol=1e-5)

    def test_a_batch_without_targets_costs_nothing(self) -> None:
        model = randomised_model(tiny_model_config())
        inputs = random_tokens(2, 5)
        loss = model.loss(inputs, torch.full_like(inputs, IGNORE_INDEX))
        assert loss.item() == 0.0
        assert all((gradient == 0).all() for gradient in gradients(model, loss).values())

    def test_dropout_only_in_training(self) -> None:
        model = build_model(tiny_model_config(dropout=0.5), 1)
        inputs = random_tokens(2, 8)
        assert not torch.equal(model.train().logits(inputs), model.logits(inputs))
        assert torch.equal(model.eval().logits(inputs), model.logits(inputs))
        plain = build_model(tiny_model_config(), 1)
        assert torch.equal(model.logits(inputs), plain.logits(inputs))


class TestPositions:
    """Positions count from the start of the window, or of the text if a token starts one."""

    TOKENS = torch.tensor([[5, 88, 7, 8, 88, 88, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])

    @staticmethod
    def positions(model: GPT2, tokens: Tensor) -> Tensor:
        """Return the positions that the model looks up."""
        looked_up: list[Tensor] = []
        handle = model.wpe.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]))
        model.logits(tokens)
        handle.remove()
        return looked_up[0].broadcast_to(tokens.shape)

    def test_by_default_they_count_from_the_start_of_the_window(self) -> None:
        model = randomised_model(tiny_model_config())
        assert self.positions(model, self.TOKENS).tolist() == [list(range(10))] * 2

    def test_they_start_again_with_each_text(self) -> None:
        model = randomised_model(tiny_model_config(reset_positions_at=88))
        assert self.positions(model, self.TOKENS).tolist() == [[0, 0, 1, 2, 0, 0, 1, 2, 3, 4], list(range(10))]

    def test_no_position_beyond_the_longest_text_is_used(self) -> None:
        model = randomised_model(tiny_model_config(reset_positions_at=88)).eval()
        logits = model.logits(self.TOKENS[:1])
        with torch.no_grad():
            model.wpe.weight[5:].fill_(1e6)
            assert torch.equal(model.logits(self.TOKENS[:1]), logits)
            model.wpe.weight[4] += 1.0
            assert not torch.equal(model.logits(self.TOKENS[:1]), logits)

    def test_earlier_texts_are_still_seen(self) -> None:
        model = randomised_model(tiny_model_config(reset_positions_at=88)).eval()
        changed = self.TOKENS[:1].clone()
        changed[0, 2] = 9
        assert not torch.equal(model.logits(self.TOKENS[:1])[0, 6:], model.logits(changed)[0, 6:])

    def test_where_no_text_begins_nothing_changes(self) -> None:
        plain, resetting = (randomised_model(tiny_model_config(reset_positions_at=at)).eval() for at in (None, 88))
        assert torch.equal(plain.logits(self.TOKENS[1:]), resetting.logits(self.TOKENS[1:]))

    def test_the_token_must_exist(self) -> None:
        with pytest.raises(ValueError, match=r"reset_positions_at \(89\) must be a token, less than vocab_size \(89\)"):
            tiny_model_config(reset_positions_at=VOCAB_SIZE)
