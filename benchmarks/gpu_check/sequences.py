"""Train several runs one after the other and compare them: resumed runs, and checkpoints that change the device.

``python -m benchmarks.gpu_check.sequences KIND BACKEND SECTIONS_JSON FOLDER [REFERENCE]``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.bounds import loss_bound
from benchmarks.portability import last_tensors
from pipeline.checkpoint.layout import checkpoint_folder
from tests.support.runs import TRAIN, Curve, Sections, merged, ranks_command, read_curve, train_arguments

STEPS, SAVED_AT = 12, 6
MOVED_AT = 10  # steps on the first device, and then on the second device


def train(backend: str, folder: Path, sections: Sections) -> Curve:
    """Train in a child process, and return the loss curve. The child process writes to the caller's output."""
    subprocess.run(ranks_command(1, TRAIN, train_arguments(backend, folder, sections)), check=True, env=os.environ)
    return read_curve(folder)


def compare_resumed(backend: str, sections: Sections, folder: Path) -> dict[str, Any]:
    """Train with dropout and recomputation: two equal runs, and a run that resumes from the middle of the first run.

    On a GPU, compiled code may add gradients of the embedding in any order. The two equal runs then differ in the last
    bits. In this case, the resumed run may also differ from the first run, but only slightly. A resumed run that draws
    wrong dropout masks would differ by 1e-2 nats or more.
    """
    sections = merged(
        sections,
        {
            "model": {"dropout": 0.1, "activation_checkpointing": True},
            "schedule": {"max_steps": STEPS},
            "checkpoint": {"every_steps": SAVED_AT, "keep_last": 10},
        },
    )
    whole, again = (train(backend, folder / name, sections) for name in ("whole", "again"))
    start: Sections = {"checkpoint": {"resume": str(checkpoint_folder(folder / "whole", SAVED_AT))}}
    resumed = train(backend, folder / "resumed", merged(sections, start))
    tensors = {name: last_tensors(folder / name) for name in ("whole", "again", "resumed")}
    repeats = whole == again and tensors["whole"] == tensors["again"]
    continues = whole.after(SAVED_AT) == resumed and tensors["whole"] == tensors["resumed"]
    figures: dict[str, Any] = {
        "repeats_bit_for_bit": repeats,
        "resumes_bit_for_bit": continues,
        "largest_difference_repeated": whole.largest_loss_difference(again),
        "largest_difference_resumed": whole.after(SAVED_AT).largest_loss_difference(resumed),
    }
    if repeats and not continues:
        figures["problem"] = "two equal runs are identical, but the resumed run differs"
    elif not figures["largest_difference_resumed"] <= loss_bound("fp32"):
        figures["problem"] = f"the resumed run differs by more than {loss_bound('fp32'):g} nats"
    return figures


def move_checkpoint(backend: str, sections: Sections, folder: Path, reference: Path) -> dict[str, Any]:
    """Continue a run that began on the CPU: first on the device, and then on the CPU again.

    ``reference`` is the folder of the run that began on the CPU.
    """
    sections = merged(sections, {"checkpoint": {"every_steps": MOVED_AT, "keep_last": 10}})
    whole = read_curve(reference)

    def continue_run(name: str, source: Path, step: int, changes: Sections) -> float:
        start: Sections = {"checkpoint": {"resume": str(checkpoint_folder(source, step))}}
        curve = train(backend, folder / name, merged(sections, changes, start))
        return curve.largest_loss_difference(whole.after(step))

    on_device = continue_run("device", reference, MOVED_AT, {})
    back = continue_run("cpu", folder / "device", 2 * MOVED_AT, {"run": {"device": "cpu"}})
    figures: dict[str, Any] = {"largest_difference_device": on_device, "largest_difference_back": back}
    bound = loss_bound("fp32")
    if not max(on_device, back) <= bound:
        figures["problem"] = f"the losses differ by more than {bound:g} nats"
    return figures


def main() -> None:
    kind, backend, text, target, *rest = sys.argv[1:]
    sections, folder = json.loads(text), Path(target)
    if kind == "resumed":
        figures = compare_resumed(backend, sections, folder)
    else:
        figures = move_checkpoint(backend, sections, folder, Path(rest[0]))
    (folder / "result.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
