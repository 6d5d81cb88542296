"""Define the options of the benchmarks that compare tiny runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pipeline.config.schema import OptimizerConfig
from tests.support.runs import (
    BACKENDS,
    GROUPED,
    TINY_BYTE_RUN,
    TINY_RUN,
    Sections,
    make_byte_corpus,
    make_corpus,
    merged,
)

OPTIMIZERS = get_args(OptimizerConfig.model_fields["name"].annotation)
OFFLOADS = ("zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class RunOptions:
    optimizer: str
    uses_bytes: bool
    backends: tuple[str, ...]

    @property
    def base(self) -> Sections:
        return merged(TINY_BYTE_RUN if self.uses_bytes else TINY_RUN, {"optimizer": {"name": self.optimizer}})

    def make_corpus(self, folder: Path) -> Path:
        """Write token shards for the runs into a new folder, and return the folder."""
        return (make_byte_corpus if self.uses_bytes else make_corpus)(folder)


def add_run_options(
    parser: argparse.ArgumentParser, *, backends: Sequence[str] = BACKENDS, uses_bytes: bool = False
) -> None:
    """Add the options to a parser.

    Args:
        backends: the default backends.
        uses_bytes: whether the runs use one token per byte by default.
    """
    every = (*BACKENDS, *GROUPED, *OFFLOADS)
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--backends", nargs="+", default=list(backends), choices=every, metavar="BACKEND")
    parser.add_argument("--offload", action="store_true", help="also use the backends with offload")
    parser.add_argument(
        "--bytes",
        action=argparse.BooleanOptionalAction,
        default=uses_bytes,
        help="use one token per byte instead of GPT-2's vocabulary, so that steps are several times faster "
        "(default: %(default)s)",
    )


def run_options(arguments: argparse.Namespace) -> RunOptions:
    backends = (*arguments.backends, *(OFFLOADS if arguments.offload else ()))
    return RunOptions(arguments.optimizer, arguments.bytes, tuple(dict.fromkeys(backends)))
