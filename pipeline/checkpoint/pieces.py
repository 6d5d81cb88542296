"""How runs of a parameter's elements are named inside the safetensors files.

A whole parameter stands under its canonical name and in its shape; a run of its elements is flat,
under ``name[start:stop]``. Moments have the prefix ``exp_avg/`` or ``exp_avg_sq/``, in files of their own.
"""

from __future__ import annotations

import re

#: Kinds of tensor, by the name of the ``Fragment`` attribute that holds them.
WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"

_RUN = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def run_label(name: str, start: int, stop: int) -> str:
    """The label of elements ``start`` to ``stop`` of a flattened parameter."""
    return f"{name}[{start}:{stop}]"


def parse_label(label: str) -> tuple[str, tuple[int, int] | None]:
    """The parameter's name, and the run of elements; None: the whole parameter."""
    match = _RUN.fullmatch(label)
    return (match["name"], (int(match["start"]), int(match["stop"]))) if match else (label, None)
