"""Divide the time of a Chrome trace by class of kernel. Measure how much communication overlaps with computation.

On a GPU, events are kernels and copies. On a CPU, events are operators. The time of an operator does not include the
operators that it calls.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMUNICATION, ELEMENTWISE, OTHER = "communication", "norm, elementwise, loss", "other"

#: Kernels that Inductor generated, without its templates for matrix products. Their names list the operators that they
#: fuse, among them copies and parts of products.
FUSED = re.compile(r"triton_(?!tem_|mm)")

#: Class -> pattern of names, in order: the first match counts. Names are those of cuBLAS (nvjet, gemm, xmma), CUTLASS,
#: cuDNN, flash attention, torch and Inductor's templates (triton_tem_), and of torch's operators for a CPU.
CLASSES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        COMMUNICATION: r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_\b",
        "attention": r"flash|fmha|sdpa|sdp_|attention|attn",
        "optimizer": r"adam|multi_tensor_apply|foreach",
        "matrix products": (
            r"triton_(tem_|mm)|gemm|nvjet|xmma|cutlass|cublas|matmul|splitk|dot_kernel|\bmm\b|addmm|bmm|linear"
        ),
        "copies": r"memcpy|memset|\bcopy_|::copy|_to_copy|aten::(to|clone|contiguous|fill_|zero_)\b",
        ELEMENTWISE: (
            r"elementwise|layer_?norm|softmax|gelu|reduce|vectorized|dropout|embedding|nll|cross_entropy|index|"
            r"graph_|aten::(add|mul|div|sub|sum|neg|exp|log|where|cat|stack|gather|cumsum|square|sqrt|norm|linalg)"
        ),
        OTHER: r"",
    }.items()
}

_DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
_CPU_CATEGORY = "cpu_op"

Interval = tuple[float, float]  # start and end in microseconds


@dataclass(frozen=True)
class Event:
    name: str
    start: float  # microseconds
    end: float
    own: float  # microseconds without nested events

    @property
    def kind(self) -> str:
        if FUSED.match(self.name):
            return ELEMENTWISE
        return next(kind for kind, pattern in CLASSES.items() if pattern.search(self.name))


def read_events(trace: Path) -> list[Event]:
    """Return the events of the GPU if there are any, otherwise the operators of the CPU."""
    rows = [row for row in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if row.get("ph") == "X"]
    on_device = [row for row in rows if row.get("cat") in _DEVICE_CATEGORIES]
    if on_device:
        return [Event(row["name"], row["ts"], row["ts"] + row["dur"], row["dur"]) for row in on_device]
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("cat") == _CPU_CATEGORY:
            by_thread[row["tid"]].append(row)
    return [event for thread in by_thread.values() for event in _without_nested(thread)]


def _without_nested(rows: list[dict[str, Any]]) -> list[Event]:
    """Return the operators of one thread. An operator's time does not include the operators that it calls."""
    events: list[Event] = []
    open_events: list[list[Any]] = []  # [name, start, end, own]

    def close_until(time: float) -> None:
        while open_events and open_events[-1][2] <= time:
            events.append(Event(*open_events.pop()))

    for row in sorted(rows, key=lambda row: (row["ts"], -row["dur"])):
        close_until(row["ts"])
        if open_events:
            open_events[-1][3] -= row["dur"]
        open_events.append([row["name"], row["ts"], row["ts"] + row["dur"], row["dur"]])
    close_until(float("inf"))
    return events


def shares_of_time(events: Sequence[Event]) -> dict[str, float]:
    """Return each class's share of the sum of all events' times. Streams may overlap."""
    total = sum(event.own for event in events)
    shares = dict.fromkeys(CLASSES, 0.0)
    for event in events:
        shares[event.kind] += event.own / total
    return shares


def longest(events: Sequence[Event], kind: str, count: int) -> list[tuple[str, float]]:
    """Return the names in a class that take the most time, each with its share of the time of all events."""
    total = sum(event.own for event in events)
    by_name: dict[str, float] = defaultdict(float)
    for event in events:
        if event.kind == kind:
            by_name[event.name] += event.own / total
    return sorted(by_name.items(), key=lambda item: -item[1])[:count]


def busy_share(events: Sequence[Event]) -> float:
    span = max(event.end for event in events) - min(event.start for event in events)
    return _length(_union((event.start, event.end) for event in events)) / span


def overlap_share(events: Sequence[Event]) -> float | None:
    """Return the share of the communication time in which computation also runs, or None without communication."""
    communication = _union((e.start, e.end) for e in events if e.kind == COMMUNICATION)
    computation = _union((e.start, e.end) for e in events if e.kind != COMMUNICATION)
    if not communication:
        return None
    either = _length(_union([*communication, *computation]))
    return (_length(communication) + _length(computation) - either) / _length(communication)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)
