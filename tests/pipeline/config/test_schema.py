"""The schema's defaults are the GPT-2 124M recipe, and it refuses values that cannot be right."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.schema import MODEL_PRESETS, CheckpointConfig, Config, LoggingConfig, describe_model


def with_model(**model: Any) -> Config:
    return Config.model_validate({"model": model})


class TestDefaults:
    def test_the_model_is_gpt2_124m(self) -> None:
        model = Config().model
        assert (model.n_layer, model.n_head, model.n_embd) == (12, 12, 768)
        assert (model.context_length, model.vocab_size) == (1024, 50257)
        assert model.dropout == 0.0

    def test_the_batch_is_half_a_million_tokens(self) -> None:
        assert Config().batch.tokens_per_step == 2**19

    def test_the_optimizer_is_that_of_the_gpt3_paper(self) -> None:
        optimizer = Config().optimizer
        assert (optimizer.name, optimizer.learning_rate) == ("adamw", 6e-4)
        assert optimizer.betas == (0.9, 0.95)
        assert (optimizer.eps, optimizer.weight_decay, optimizer.grad_clip) == (1e-8, 0.1, 1.0)

    def test_the_schedule_is_ten_billion_tokens(self) -> None:
        config = Config()
        assert config.schedule.max_steps * config.batch.tokens_per_step == pytest.approx(10e9, rel=1e-3)
        assert config.schedule.warmup_steps * config.batch.tokens_per_step == pytest.approx(375e6, rel=1e-3)
        assert config.schedule.min_lr_ratio == 0.1

    def test_a_sample_is_as_long_as_the_context(self) -> None:
        assert Config().seq_len == 1024
        assert with_model(context_length=64).seq_len == 64
        assert Config.model_validate({"data": {"seq_len": 128}}).seq_len == 128


class TestPresets:
    @pytest.mark.parametrize(
        ("preset", "sizes"),
        [
            ("gpt2", (12, 12, 768)),
            ("gpt2-medium", (24, 16, 1024)),
            ("gpt2-large", (36, 20, 1280)),
            ("gpt2-xl", (48, 25, 1600)),
        ],
    )
    def test_sizes_are_those_of_openai(self, preset: str, sizes: tuple[int, int, int]) -> None:
        model = with_model(preset=preset).model
        assert (model.n_layer, model.n_head, model.n_embd) == sizes
        assert model.context_length == 1024

    @pytest.mark.parametrize("preset", list(MODEL_PRESETS))
    def test_one_size_can_be_changed_alone(self, preset: str) -> None:
        model = with_model(preset=preset, n_layer=3).model
        assert model.n_layer == 3
        assert model.n_embd == MODEL_PRESETS[preset]["n_embd"]  # type: ignore[index]
        assert str(model) == f"{preset} with n_layer 3"

    def test_it_is_described_by_its_preset_and_by_the_sizes_that_differ(self) -> None:
        model = with_model(preset="gpt2-tiny", n_embd=384, n_head=6, vocab_size=300).model
        assert str(model) == "gpt2-tiny with n_head 6, n_embd 384, vocab_size 300"
        assert str(with_model(preset="gpt2-xl").model) == "gpt2-xl"
        assert describe_model({}) == "unknown", "the config of another version"


class TestRefusals:
    @pytest.mark.parametrize(
        "content",
        [
            {"schedule": {"max_steps": "100"}},
            {"schedule": {"max_steps": 100.0}},
            {"run": {"seed": True}},
            {"run": {"seed": -1}},
            {"run": {"compile": 1}},
            {"optimizer": {"learning_rate": 0}},
            {"optimizer": {"learning_rate": float("inf")}},
            {"optimizer": {"weight_decay": float("nan")}},
            {"optimizer": {"betas": [0.9, 1.0]}},
            {"optimizer": {"betas": [0.9]}},
            {"model": {"dropout": 1.0}},
            {"model": {"preset": ["gpt2"]}},
            {"model": None},
            {"checkpoint": {"keep_last": 0}},
            {"checkpoint": {"keep_best": True}, "evaluation": {"tasks": []}},
            {"schedule": {"stop_at_val_loss": 3.0}, "evaluation": {"tasks": []}},
            {"schedule": {"min_lr_ratio": 1.1}},
            {"anything": {}},
            {"model": {"n_heads": 4}},
        ],
    )
    def test_wrong_types_ranges_and_keys(self, content: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Config.model_validate(content)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model": {"n_embd": 100, "n_head": 3}}, r"n_embd \(100\) must be a multiple of n_head \(3\)"),
            ({"schedule": {"warmup_steps": 6, "max_steps": 5}}, r"warmup_steps \(6\) must not exceed max_steps \(5\)"),
            ({"data": {"seq_len": 2048}}, r"data.seq_len \(2048\) must not exceed model.context_length \(1024\)"),
            ({"checkpoint": {"remote": "s3://"}}, "s3:// is not a URL; expected one such as s3://bucket/run"),
        ],
    )
    def test_values_that_cannot_work(self, content: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            Config.model_validate(content)

    def test_bounds_are_inclusive(self) -> None:
        Config.model_validate({"schedule": {"warmup_steps": 5, "max_steps": 5, "min_lr_ratio": 1}})
        Config.model_validate({"data": {"seq_len": 1024}})
        Config.model_validate({"optimizer": {"learning_rate": 1, "grad_clip": 0, "betas": [0, 0]}})

    def test_a_config_cannot_be_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Config().run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, ["jsonl", "tensorboard", "console"]),
        ({"sinks": ["csv"]}, ["jsonl", "csv"]),
        ({"sinks": ["console", "jsonl", "console"]}, ["jsonl", "console"]),
        ({"tensorboard": False}, ["jsonl", "console"]),
        ({"tensorboard": True, "sinks": ["csv"]}, ["jsonl", "csv", "tensorboard"]),
    ],
)
def test_sinks_always_have_jsonl_and_understand_the_older_key(section: dict[str, Any], expected: list[str]) -> None:
    assert LoggingConfig.model_validate(section).sinks == expected


def test_an_unknown_sink_is_refused() -> None:
    with pytest.raises(ValidationError, match="tensorboard"):
        LoggingConfig.model_validate({"sinks": ["tensorbord"]})


@pytest.mark.parametrize("word", ["Auto", "NONE"])
def test_a_word_in_upper_case_is_not_a_path(word: str) -> None:
    with pytest.raises(ValueError, match=rf"{word} is a path; did you mean {word.lower()}\? .* \./{word}\)"):
        CheckpointConfig(resume=word)
    assert CheckpointConfig(resume=f"./{word}").resume == f"./{word}"
