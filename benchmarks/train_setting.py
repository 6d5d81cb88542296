"""Define the setting of a training benchmark and the result of a contender, as JSON for other processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.hardware.device import GIB
from tests.support.runs import Sections


@dataclass(frozen=True)
class Setting:
    data: str  # a folder of token shards
    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int
    micro_batch_size: int  # sequences per process; a step is one micro-batch
    processes: int
    device: str
    precision: str
    steps: int  # with the warm-up
    warmup_steps: int  # not counted, because of compilers and caches
    steps_per_row: int  # the number of steps between two readings of the loss and the clock
    learning_rate: float = 6e-4
    seed: int = 1337

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a step over all processes."""
        return self.processes * self.micro_batch_size * self.seq_len

    def sections(self) -> Sections:
        """Return the setting as a run config: constant learning rate after a few steps, no validation."""
        return {
            "run": {"device": self.device, "precision": self.precision, "seed": self.seed, "compile": True},
            "model": {
                "n_layer": self.n_layer,
                "n_head": self.n_head,
                "n_embd": self.n_embd,
                "context_length": self.seq_len,
            },
            "data": {"path": self.data, "verify": False},
            "batch": {"tokens_per_step": self.tokens_per_step, "micro_batch_size": self.micro_batch_size},
            "optimizer": {"learning_rate": self.learning_rate},
            "schedule": {"warmup_steps": 5, "max_steps": self.steps, "min_lr_ratio": 1.0},
            "checkpoint": {"every_steps": self.steps, "asynchronous": False},
            "evaluation": {"tasks": []},
            "logging": {"every_steps": self.steps_per_row, "sinks": ["jsonl", "console"]},
        }

    def config(self) -> Config:
        return Config.model_validate(self.sections())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Measured:
    """The rows of a contender. Each row covers ``steps_per_row`` steps."""

    losses: dict[int, float]  # by step: the mean over its targets, in nats
    step_ms: list[float]  # of the rows after the warm-up
    peak_bytes: int | None  # the largest peak of a process: resident on a CPU, allocated on a GPU; None if unknown
    first_step_ms: float | None = None  # with compilation; None if unknown

    @classmethod
    def of_rows(cls, rows: list[dict[str, Any]], setting: Setting) -> Measured:
        """Return the result from rows in the form of ``metrics.jsonl``."""
        trained = [row for row in rows if "loss" in row]
        counted = [row["step_ms"] for row in trained if row["step"] > setting.warmup_steps]
        peak = max(row["peak_memory_gib"] for row in trained)
        losses = {row["step"]: row["loss"] for row in trained}
        return cls(losses, counted, int(peak * GIB), trained[0]["step_ms"])
