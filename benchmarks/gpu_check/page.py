"""Write the result of a check as one Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu_check.bounds import LOSS_BOUNDS
from benchmarks.gpu_check.plan import OFFLOAD, PEERS, PRECISIONS, PROFILED, STAGE_TITLES, VARIANTS, Check
from benchmarks.gpu_check.steps import FAILED, PASSED, SKIPPED, Record, Stage
from benchmarks.gpu_check.trace import CLASSES
from pipeline.hardware.device import GIB
from tests.support.runs import BACKENDS
from tests.support.tables import format_table

NOT_REACHED = "not reached"
NOT_MEASURED = "not measured"


def render(check: Check, record: Record, command: str) -> str:
    """Return the page. ``command`` is what the reader types to continue the check."""
    stages = check.stages()
    machine = check.machine
    kind = "" if check.on_gpu else ", a rehearsal without a GPU: all sizes are tiny, and no figure stands for a GPU"
    blocks = [
        f"# GPU check: {machine['device']}{kind}",
        _describe_machine(machine),
        f"    {command}",
        _summary(stages, record, command),
        *_machine_blocks(record),
        *_correctness_blocks(check, record),
        *_speed_blocks(check, record, 1),
        *_generation_blocks(record),
        *_memory_blocks(record),
        *_profile_blocks(record, 1),
        *_several_blocks(check, record),
        *_failures(record),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _describe_machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {found or 'missing'}" for name, found in machine["packages"].items())
    parts = [f"{machine['cores']} CPU cores, Python {machine['python']}, torch {machine['torch']}, {packages}"]
    if machine["device_type"] == "cuda":
        parts.insert(
            0,
            f"{machine['devices']} x {machine['device']} with {machine['memory_gib']:.1f} GiB and compute capability "
            f"{machine['capability']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, NCCL {machine['nccl']}",
        )
    return "; ".join(parts) + "."


def _summary(stages: Sequence[Stage], record: Record, command: str) -> str:
    counts = {title: dict.fromkeys((PASSED, FAILED, SKIPPED, NOT_REACHED), 0) for title in STAGE_TITLES}
    waiting = []
    for stage in stages:
        for step in stage.steps:
            status = record.status(step.name) or NOT_REACHED
            counts[stage.title][status] += 1
            waiting += [step.name] if status == NOT_REACHED else []
    rows = [(f"{key}: {STAGE_TITLES[key]}", *found.values()) for key, found in counts.items()]
    table = format_table(("section", PASSED, FAILED, SKIPPED, NOT_REACHED), rows)
    if not waiting:
        return table
    shown = ", ".join(waiting[:12]) + (f" and {len(waiting) - 12} more" if len(waiting) > 12 else "")
    return f"{table}\n\nNot reached yet: {shown}. The same command continues with these steps."


def _cell(record: Record, name: str, text: str | None = None) -> str:
    """Return ``text`` if the step has figures. Otherwise, return the status of the step."""
    status = record.status(name)
    if status is None:
        return NOT_REACHED
    if text is None or status == SKIPPED:
        return status
    return text if status == PASSED else f"{text} **failed**"


def _machine_blocks(record: Record) -> Iterable[str]:
    yield "## a: machine and tests"
    findings = record.figures("doctor").get("findings", [])
    if findings:
        yield format_table(("doctor", "level", "finding"), [(f["subject"], f["level"], f["says"]) for f in findings])
    rows = []
    for name, outcome in record.outcomes.items():
        if name.startswith("tests "):
            cases = list(outcome.get("figures", {}).get("tests", {}).values())
            numbers = ", ".join(f"{cases.count(kind)} {kind}" for kind in (PASSED, FAILED, SKIPPED) if kind in cases)
            rows.append((name.removeprefix("tests ").replace("_", r"\_"), numbers or outcome["status"]))
    if rows:
        yield format_table(("tests with the marker gpu", "outcome"), sorted(rows))


def _correctness_blocks(check: Check, record: Record) -> Iterable[str]:
    yield "## b: correctness"
    bounds = ", ".join(f"{bound:g} in {precision}" for precision, bound in LOSS_BOUNDS.items())
    yield (
        "Largest difference in loss, in nats, from the run of one CPU process in fp32, over 30 steps: uncompiled, then "
        f"compiled. It may be at most {bounds}."
    )
    yield _curve_table(record, 1)
    rows = [(name, _cell(record, name, _describe(record.figures(name)))) for name in _other_checks(check)]
    yield format_table(("check", "result"), rows)


def _curve_table(record: Record, processes: int) -> str:
    ranks = f" x{processes}" if processes > 1 else ""
    rows = []
    for backend in (*BACKENDS, *(OFFLOAD if processes == 1 else ())):
        cells = []
        for precision in PRECISIONS:
            names = [f"curve {backend} {precision} {how}{ranks}" for how in ("eager", "compiled")]
            if backend in OFFLOAD:
                names = names[:1] if precision == "fp32" else []
            cells.append(" / ".join(_difference(record, name) for name in names))
        rows.append((backend, *cells))
    return format_table(("backend", *PRECISIONS), rows)


def _difference(record: Record, name: str) -> str:
    difference = record.figures(name).get("largest_difference")
    return _cell(record, name, None if difference is None else f"{difference:.1e}")


def _other_checks(check: Check) -> list[str]:
    names = [step.name for stage in check.stages() for step in stage.steps if stage.title == "b"]
    return [name for name in names if not name.startswith("curve")]


def _describe(figures: dict[str, Any]) -> str | None:
    texts = []
    for key, value in figures.items():
        shown = f"{value:.1e}" if isinstance(value, float) else str(value)
        texts += [f"{key.replace('_', ' ')}: {shown}"] if key != "problem" else []
    return ", ".join(texts) or None


def _speed_blocks(check: Check, record: Record, processes: int) -> Iterable[str]:
    ranks = f" x{processes}" if processes > 1 else ""
    setting = check.speed_setting(processes)
    ceilings = [figures for when in ("first", "last") if (figures := record.figures(f"ceilings {when}{ranks}"))]
    if processes == 1:
        yield "## c: speed and memory"
    model = f"{setting.n_layer} layers, width {setting.n_embd}, {setting.seq_len} tokens"
    yield (
        f"{model}, {setting.micro_batch_size} sequences per rank and step, {processes} rank(s), {setting.precision} "
        f"(transformers: bf16 autocast), compiled, {setting.steps - setting.warmup_steps} steps after "
        f"{setting.warmup_steps}."
    )
    for figures in ceilings:
        yield (
            f"Ceiling: {figures['flops'] / 1e12:,.1f} TFLOP/s in matrix products, "
            f"{figures['bytes_per_s'] / 1e9:,.0f} GB/s copied."
        )
    ceiling = max((figures["flops"] for figures in ceilings), default=None)
    names = [
        *BACKENDS,
        *(VARIANTS if processes == 1 else ()),
        *PEERS,
        *(command.name for command in check.peer_commands),
    ]
    own = record.figures(f"speed ddp{ranks}").get("tokens_per_s")
    rows = [_speed_row(record, name, ranks, ceiling, own) for name in names]
    header = ("contender", "tokens/s", "of the ceiling", "of ddp", "peak memory", "first step", "whole process")
    yield format_table(header, rows)


def _speed_row(record: Record, name: str, ranks: str, ceiling: float | None, own: float | None) -> list[str]:
    step = f"speed {name}{ranks}"
    figures = record.figures(step)
    if "tokens_per_s" not in figures:
        return [name, _cell(record, step), *[""] * 5]
    peak, first = figures["measured"]["peak_bytes"], figures["first_step_s"]
    return [
        name,
        _cell(record, step, f"{figures['tokens_per_s']:,.0f}"),
        "" if ceiling is None else f"{figures['flops'] / ceiling:.1%}",
        "" if own is None else f"{figures['tokens_per_s'] / own:.2f}",
        "not known" if peak is None else f"{peak / GIB:.2f} GiB",
        "not known" if first is None else f"{first:.1f} s",
        f"{figures['wall_s']:.0f} s",
    ]


def _generation_blocks(record: Record) -> Iterable[str]:
    settings = record.figures("generation")
    if settings:
        contenders = next(iter(settings.values()))
        rows = [(name, *(f"{speeds[name]:,.0f}" for speeds in settings.values())) for name in contenders]
        yield format_table(("generation, tokens/s", *settings), rows)


def _memory_blocks(record: Record) -> Iterable[str]:
    rows = []
    for backend in BACKENDS:
        name = f"memory {backend}"
        if name in record.outcomes:
            found = record.figures(name)
            sizes = (
                [f"{found[key] / GIB:.2f} GiB" for key in ("planned_bytes", "measured_bytes")] if found else ["", ""]
            )
            text = f"{found['difference']:+.1%}" if found else None
            rows.append((backend, *sizes, _cell(record, name, text)))
    if rows:
        yield format_table(("memory of one rank, bf16", "planned", "measured", "difference"), rows)


def _profile_blocks(record: Record, processes: int) -> Iterable[str]:
    ranks = f" x{processes}" if processes > 1 else ""
    profiles = {name: record.figures(f"profile {name}{ranks}") for name in PROFILED}
    profiles = {name: figures for name, figures in profiles.items() if "shares" in figures}
    if not profiles:
        return
    rows = [(kind, *(f"{p['shares'][kind]:.1%}" for p in profiles.values())) for kind in CLASSES]
    rows.append(("time in which the device works", *(f"{p['busy_share']:.1%}" for p in profiles.values())))
    overlaps = [p["overlap_share"] for p in profiles.values()]
    shown = (NOT_MEASURED if share is None else f"{share:.1%}" for share in overlaps)
    rows.append(("communication that computation overlaps", *shown))
    yield format_table((f"share of the time of three steps{ranks}", *profiles), rows)
    for name, figures in profiles.items():
        kernels = [
            f"`{kernel[:60]}` {share:.1%}" for found in figures["longest"].values() for kernel, share in found[:1]
        ]
        yield f"Longest of each class under {name}{ranks}: {', '.join(kernels)}."


def _several_blocks(check: Check, record: Record) -> Iterable[str]:
    yield "## d: several devices"
    if check.on_gpu and check.machine["devices"] < 2:
        yield "This machine has one GPU, so this section was skipped."
        return
    yield f"Curves with {check.curve_processes} ranks under {'NCCL' if check.on_gpu else 'gloo'}:"
    yield _curve_table(record, check.curve_processes)
    yield from _speed_blocks(check, record, check.processes)
    rows = []
    for name in (*BACKENDS, *PEERS):
        alone, together = (record.figures(f"speed {name}{r}").get("tokens_per_s") for r in ("", f" x{check.processes}"))
        if alone and together:
            rows.append((name, f"{together / (alone * check.processes):.1%}"))
    if rows:
        yield format_table(
            ("contender", f"tokens/s of {check.processes} ranks, divided by {check.processes} x one rank"), rows
        )
    yield from _profile_blocks(record, check.processes)


def _failures(record: Record) -> Iterable[str]:
    failed = {name: outcome for name, outcome in record.outcomes.items() if outcome["status"] == FAILED}
    skipped = {name: outcome for name, outcome in record.outcomes.items() if outcome["status"] == SKIPPED}
    if skipped:
        yield "## Skipped"
        reasons = dict.fromkeys(outcome["problem"] for outcome in skipped.values())
        for reason in reasons:
            names = ", ".join(name for name, outcome in skipped.items() if outcome["problem"] == reason)
            yield f"- {reason}: {names}"
    if failed:
        yield "## Failed"
    for name, outcome in failed.items():
        log = "\n".join(f"    {line}" for line in outcome.get("log", []))
        yield f"### {name}\n\n{outcome['problem']}\n\n    {outcome['command'][:1000]}\n\n{log}"
