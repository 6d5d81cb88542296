"""A run that was written before the sources were split into rooms can be inspected, loaded and continued.

``tests/data/before_rooms/run`` was trained for 6 steps by 2 ranks under ZeRO-1 on the data in ``bytes`` beside it. Its
checkpoint of step 3 is kept, with the metrics of all steps. Only the paths in its JSON files were replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.inspection import CheckpointReport, inspect
from pipeline.checkpoint.loading import load_model, load_training_state
from pipeline.checkpoint.verification import locate_checkpoint, verify_checkpoints
from pipeline.config.loading import load_config
from pipeline.distributed.world import World
from tests.pipeline.checkpoint.conftest import contents, make_backend, updates_of
from tests.support.runs import REPOSITORY, TRAIN, overrides, read_curve, run_ranks

BEFORE = REPOSITORY / "tests" / "data" / "before_rooms"
RUN = BEFORE / "run"
CHECKPOINT = RUN / "checkpoints" / "step_00000003"


def sha256_of_tensors(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def test_inspect() -> None:
    report = inspect(CHECKPOINT)
    assert isinstance(report, CheckpointReport) and report.problem is None and report.contents is not None
    found = {**report.contents, **report.contents["model"]}
    expected: dict[str, object] = {
        "step": 3,
        "samples": 12,
        "tokens": 192,
        "updates": 3,
        "parameters": 3944,
        "n_embd": 8,
        "vocab_size": 257,
    }
    expected |= {"backend": "deepspeed ZeRO-1", "world_size": 2, "precision": "fp32", "loss_scale": None}
    assert {key: found[key] for key in expected} == expected
    assert found["ranks"] == [
        {"rank": 0, "weights": 10656, "moments": 21536},
        {"rank": 1, "weights": 11392, "moments": 23176},
    ]


def test_verify() -> None:
    lines: list[str] = []
    verify_checkpoints(RUN, lines.append)
    assert lines[0] == f"ok       {CHECKPOINT}" and len(lines) == 2
    assert locate_checkpoint(RUN) == CHECKPOINT


def test_the_weights() -> None:
    loaded = load_model(RUN, torch.device("cpu"))
    assert (loaded.step, loaded.run_folder, loaded.config.run.name) == (3, RUN, "zero1")
    weights = sha256_of_tensors(list(loaded.model.parameters()))
    assert weights == "ac534d6ed70aca08ba211055ef9770c8ba8c20905b292f89d7bcdab81023fded"


def test_the_training_state(world: World) -> None:
    model = load_config([RUN / "config.json"]).model.model_dump()
    backend = make_backend(world, seed=2, model=model)
    state = load_training_state(CHECKPOINT, backend)
    assert (state.step, state.samples, state.tokens, state.updates, state.seed) == (3, 12, 192, 3, 1337)
    assert (state.loss_scale, state.loss_scale_good_steps, state.guard.recent) == (None, 0, ())
    assert state.data_sha256 == "2b8adb402daa15eff06a9920cee625b9fc385de483fec54ac21665727ae81147"
    assert updates_of(backend) == 3
    assert (
        sha256_of_tensors(list(contents(backend).values()))
        == "c302af134fbd2933a3f8c4b9bd862d923d6a93e4fa6ede7cdfd22c11ea2cc78b"
    )


@pytest.mark.parametrize("backend", ["deepspeed", "ddp"])
def test_one_process_continues_what_two_ranks_began(tmp_path: Path, backend: str) -> None:
    """The losses of the remaining steps are those of the old run up to fp32 rounding."""
    config = RUN / "config.json"
    if backend == "ddp":  # which accepts no settings of DeepSpeed
        config = tmp_path / "ddp.json"
        config.write_text(json.dumps({**json.loads((RUN / "config.json").read_text()), "backend": {"name": "ddp"}}))
    changes = {"run": {"out_dir": str(tmp_path / "run")}, "data": {"path": str(BEFORE / "bytes")}}
    arguments = ["--config", str(config), "--resume", str(CHECKPOINT), "--set", *overrides(changes)]
    done = run_ranks(1, TRAIN, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continues {CHECKPOINT}" in done.stdout
    assert re.search(rf"^changed   data.path .* -> {BEFORE / 'bytes'}$", done.stdout, re.MULTILINE)
    assert ("changed   backend.name deepspeed -> ddp" in done.stdout) == (backend == "ddp")
    before, after = read_curve(RUN), read_curve(tmp_path / "run")
    assert (len(before.losses), len(after.losses)) == (6, 3)
    assert after.largest_loss_difference(before.after(3)) <= 5e-6
