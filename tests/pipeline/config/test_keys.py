"""The keys of a run config, and the key that an unknown name probably means."""

from __future__ import annotations

import pytest

from pipeline.config.keys import NAMES_ELSEWHERE, field_at, find_key, keys_in, valid_keys


def test_keys_have_their_sections_and_a_star_for_an_element_of_a_list() -> None:
    keys = list(valid_keys())
    assert len(set(keys)) == len(keys)
    assert {"run", "run.seed", "backend.ddp.bucket_cap_mb", "data.mixture", "data.mixture.*.weight"} <= set(keys)
    assert "data.mixture.weight" not in keys


def test_every_key_has_a_field() -> None:
    for key in valid_keys():
        assert field_at([0 if name == "*" else name for name in key.split(".")]) is not None, key
    assert field_at(["run", "sead"]) is None
    assert field_at(["run", "seed", "x"]) is None
    assert field_at(["data", "mixture", 0]) is None and field_at(["optimizer", "betas", 0]) is None


def test_keys_of_a_section() -> None:
    assert keys_in("backend.ddp")["bucket_cap_mb"] == "backend.ddp.bucket_cap_mb"
    assert keys_in("")["run"] == "run" and "seed" not in keys_in("")
    assert keys_in("data.mixture.12")["weight"] == "data.mixture.12.weight"
    assert keys_in("no_such_section") == {}


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        ("schedule", "max_step", "schedule.max_steps"),
        ("", "modle", "model"),
        ("", "warmup_steps", "schedule.warmup_steps"),
        ("run", "Warmup_Steps", "schedule.warmup_steps"),
        ("data.mixture.1", "wieght", "data.mixture.1.weight"),
        ("optimizer", "LR", "optimizer.learning_rate"),
        ("model", "block_size", "model.context_length"),
        ("optimizer", "fused", None),
        ("", "zzz", None),
    ],
)
def test_the_key_that_a_name_probably_means(section: str, name: str, key: str | None) -> None:
    assert find_key(section, name) == key


def test_the_nearest_key_of_the_same_section_is_preferred() -> None:
    """Several sections have the key ``every_steps``."""
    for section in ("logging", "evaluation", "checkpoint"):
        assert find_key(section, "every_step") == f"{section}.every_steps"


def test_a_name_of_another_program_means_its_key_in_any_section() -> None:
    keys = set(valid_keys())
    for key, names in NAMES_ELSEWHERE.items():
        assert key in keys
        for name in names:
            assert find_key("", name) == find_key("run", name.upper()) == key
