"""Two resolved configs are compared key by key."""

from __future__ import annotations

from pipeline.config.changes import changed_settings


def test_only_keys_that_both_have_are_compared() -> None:
    """The other keys are those of another version of the program."""
    before = {"optimizer": {"eps": 1e-8, "betas": [0.9, 0.95], "old": 1}, "run": {"name": "a", "device": None}}
    now = {"optimizer": {"eps": 1e-6, "betas": [0.9, 0.99], "new": 2}, "run": {"name": "b", "device": "cpu"}}
    assert changed_settings(before, now) == {
        "optimizer.betas": "[0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.eps": "1e-08 -> 1e-06",
        "run.device": "null -> cpu",
        "run.name": "a -> b",
    }
    assert changed_settings(before, before) == {}


def test_keys_of_deepspeed_may_be_unset() -> None:
    before, now = ({"backend": {"deepspeed": {"zero_optimization": keys}}} for keys in ({"a": 1}, {"b": True}))
    assert changed_settings(before, now) == {
        "backend.deepspeed.zero_optimization.a": "1 -> unset",
        "backend.deepspeed.zero_optimization.b": "unset -> true",
    }
