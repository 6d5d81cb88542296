"""``launch/checkpoint.py`` on real checkpoints, and files of nanoGPT that are written here."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import launch.checkpoint
from launch.cli import run_command
from pipeline.backends import create_backend
from pipeline.checkpoint import (
    conversion,
    find_damage,
    list_checkpoints,
    load_training_state,
    read_state,
    save_checkpoint,
    set_aside_after,
)
from pipeline.checkpoint.inventory import inspect, readable_size
from pipeline.checkpoint.loading import load_model
from pipeline.checkpoint.pieces import KINDS, index_pieces
from pipeline.checkpoint.pruning import prune
from pipeline.config.loading import config_from_json, load_config
from pipeline.config.schema import Config, RunConfig
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World, join_world
from pipeline.errors import CheckpointError, ConfigError
from pipeline.interop.conversion import convert
from pipeline.model.gpt2 import build_model
from pipeline.run_folder.lock import lock_run_folder
from pipeline.run_folder.metrics import read_metrics
from tests.support.runs import REPOSITORY, TINY_RUN, TRAIN, child_environment, merged, run_ranks, train_run

LAUNCH = REPOSITORY / "launch"
ONE_RANK = ["manifest.json", "rank_00000_moments.safetensors", "rank_00000_weights.safetensors", "state.json"]
LAST = "checkpoints/step_00000003"

PARTS = ("weights", "moments")

Done = subprocess.CompletedProcess[str]


def command(*arguments: object) -> Done:
    """``launch/checkpoint.py`` as a person gives it."""
    return subprocess.run(
        [sys.executable, str(LAUNCH / "checkpoint.py"), *map(str, arguments)],
        cwd=REPOSITORY,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """The same without the seconds that a process takes to start."""
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    monkeypatch.setattr(launch.checkpoint, "start_logging", lambda: None)  # would outlive the call
    with pytest.raises(SystemExit) as ended:
        run_command(launch.checkpoint.main)
    status = ended.value.code
    assert isinstance(status, int)
    return Done(arguments, status, *capsys.readouterr())


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 to 3 that two ranks wrote under FSDP. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = {
        "data": {"path": str(corpus)},
        "schedule": {"max_steps": 3, "warmup_steps": 1},
        "checkpoint": {"every_steps": 1, "keep_last": 3},
    }
    result = train_run("fsdp", folder, merged(TINY_RUN, changes), processes=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def names(run_folder: Path) -> list[str]:
    return sorted(folder.name for folder in (run_folder / "checkpoints").iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_leftovers(run_folder: Path) -> None:
    """What a crashed save and a run that went back leave."""
    leftover = run_folder / "checkpoints" / ".step_00000004.partial"
    leftover.mkdir()
    (leftover / "rank_00000_weights.safetensors").write_bytes(bytes(5000))
    set_aside_after(run_folder, 2)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, by kind and name, put together by the headers alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {}
    for kind in KINDS:
        for name, pieces in index_pieces(folder, manifest)[kind].items():
            parts = []
            for piece in pieces:
                with safe_open(piece.file, framework="pt") as file:
                    parts.append(file.get_tensor(piece.key).reshape(-1))
            tensors[f"{kind} {name}"] = torch.cat(parts).view(manifest["parameters"][name])
    return tensors


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestInspect:
    def test_a_checkpoint(self, trained: Path) -> None:
        before = hashes(trained)
        lines = succeeded(command("inspect", trained / LAST)).splitlines()
        rows = {line[2:13].strip(): line[13:] for line in lines[1:]}
        assert lines[0] == str(trained / LAST)
        assert (rows["step"], rows["updates"], rows["samples"], rows["tokens"]) == ("3", "3", "24", "1,152")
        assert rows["loss scale"] == "none"
        assert rows["precision"] == "fp32"
        assert rows["written by"] == "fsdp, world size 2"
        assert rows["model"].startswith("gpt2-tiny, 2,") and "n_embd 51" in rows["model"]
        assert f"torch {torch.__version__}" in rows["versions"]
        for rank in (0, 1):
            sizes = [(trained / LAST / f"rank_0000{rank}_{part}.safetensors").stat().st_size for part in PARTS]
            weights, moments = map(readable_size, sizes)
            assert rows[f"rank {rank}"] == f"weights {weights}, moments {moments}"
        assert rows["files"] == "all there, of the right sizes"
        assert hashes(trained) == before

    def test_a_run(self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        add_leftovers(run_folder)
        os.truncate(run_folder / "checkpoints/step_00000001/rank_00001_weights.safetensors", 9)
        (run_folder / "checkpoints/step_00000002/manifest.json").write_text("{")
        before = hashes(run_folder)
        head, _, first, second, leftover, abandoned = succeeded(
            in_process(monkeypatch, capsys, "inspect", run_folder)
        ).splitlines()
        assert head.startswith(f"{run_folder}: checkpoints 2, ")
        assert first.split()[0] == "step_00000001" and " 2  fsdp " in first
        assert "rank_00001_weights.safetensors: 9 bytes, expected" in first
        assert second.split()[0] == "step_00000002" and "manifest.json: cannot be read" in second
        assert ".step_00000004.partial" in leftover and "5.0 kB  left by an interrupted save" in leftover
        assert "step_00000003.abandoned" in abandoned and "set aside when the run went back" in abandoned
        assert hashes(run_folder) == before

    def test_what_went_wrong_in_the_run(self, run_folder: Path) -> None:
        path = run_folder / LAST / "state.json"
        guard = {"rollbacks": 1, "skipped_samples": [[8, 16]]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "updates": 2, "loss_scale": 512.0, "guard": guard}))
        text = str(inspect(run_folder / LAST))
        for line in (
            "  step       3, 1 of them without an update",
            "  loss scale 512",
            "  rollbacks  1, samples left out: 8 to 15",
            f"  files      {path}: {path.stat().st_size} bytes, expected ",
        ):
            assert line in text

    def test_as_json(self, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        one = in_process(monkeypatch, capsys, "inspect", "--json", trained / LAST)
        run = in_process(monkeypatch, capsys, "inspect", trained, "--json")
        report = json.loads(succeeded(one))
        assert json.loads(succeeded(run))["checkpoints"][-1] == report
        contents = report["contents"]
        assert (contents["step"], contents["world_size"], contents["backend"]) == (3, 2, "fsdp")
        assert report["problem"] is None
        spaces = sum(space["weights"] + space["moments"] for space in contents["ranks"])
        assert spaces + contents["state_bytes"] == report["bytes"]
        assert report["bytes"] == sum(path.stat().st_size for path in (trained / LAST).iterdir())


class TestVerify:
    def test_good_and_damaged(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        second = run_folder / "checkpoints/step_00000002"
        flip_a_bit(second / "rank_00001_moments.safetensors")
        one = in_process(monkeypatch, capsys, "verify", run_folder / LAST)
        run = command("verify", run_folder)
        assert succeeded(one).splitlines()[0] == f"ok       {run_folder / LAST}"
        assert one.stdout.splitlines()[1].endswith(" MB/s")
        assert run.returncode == 2
        lines = run.stdout.splitlines()
        assert lines[0] == f"ok       {run_folder}/checkpoints/step_00000001"
        assert lines[1].startswith(f"damaged  {second}/rank_00001_moments.safetensors: contents changed")
        assert lines[2].startswith("ok")
        assert lines[3].startswith("read ")
        assert run.stderr.startswith(f"error: {run_folder}: damaged checkpoints: 1 of 3; ")
        assert len(run.stderr.splitlines()) == 1


class TestPrune:
    def test_the_newest_good_one_stays(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        add_leftovers(run_folder)
        before, size_before = hashes(run_folder), size_of(run_folder)
        dry = succeeded(in_process(monkeypatch, capsys, "prune", run_folder, "--dry-run"))
        assert hashes(run_folder) == before
        real = succeeded(command("prune", run_folder))
        assert names(run_folder) == ["step_00000002"]
        assert find_damage(run_folder / "checkpoints/step_00000002") is None
        listed, (last,) = real.splitlines()[:-1], real.splitlines()[-1:]
        assert [line[:34].split() for line in listed] == [
            ["keep", "step_00000002"],
            ["delete", ".step_00000004.partial"],
            ["delete", "step_00000003.abandoned"],
            ["delete", "step_00000001"],
        ]
        freed = readable_size(size_before - size_of(run_folder))
        assert last == f"freed {freed}"
        assert dry.splitlines() == [*listed, f"would free {freed}; nothing was deleted"]

    def test_damaged_ones_go_and_do_not_count(self, run_folder: Path) -> None:
        flip_a_bit(run_folder / LAST / "rank_00000_weights.safetensors")
        pruned = prune(run_folder, keep=1, dry_run=False)
        assert names(run_folder) == ["step_00000002"]
        assert "delete  step_00000003" in str(pruned) and "damaged: " in str(pruned)
        prune(run_folder, keep=1, dry_run=False)
        assert names(run_folder) == ["step_00000002"]

    @pytest.mark.parametrize("keep", [2, 3, 9])
    def test_as_many_as_are_asked_for(self, run_folder: Path, keep: int) -> None:
        prune(run_folder, keep, dry_run=False)
        assert names(run_folder) == ["step_00000001", "step_00000002", "step_00000003"][-keep:]

    def test_without_a_good_one_nothing_goes(self, run_folder: Path) -> None:
        add_leftovers(run_folder)
        for folder in list_checkpoints(run_folder):
            flip_a_bit(folder / "state.json")
        before = hashes(run_folder)
        with pytest.raises(CheckpointError, match="no checkpoint of it verifies, so nothing was deleted"):
            prune(run_folder, keep=1, dry_run=False)
        assert hashes(run_folder) == before

    def test_what_another_version_wrote_is_not_damaged(self, run_folder: Path) -> None:
        path = run_folder / LAST / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
        before = hashes(run_folder)
        with pytest.raises(CheckpointError, match="format version 2, this program knows 1"):
            prune(run_folder, keep=1, dry_run=False)
        assert hashes(run_folder) == before

    def test_not_while_a_run_holds_the_folder(self, run_folder: Path) -> None:
        with lock_run_folder(run_folder), pytest.raises(ConfigError, match="in use by another run"):
            prune(run_folder, keep=1, dry_run=False)
        assert len(list_checkpoints(run_folder)) == 3


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TestConvert:
    def test_one_rank_holds_what_two_held_and_trains_on(self, trained: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert "step_00000003 in " in succeeded(command("convert", trained, "--out", out))
        folder = out / LAST
        assert sorted(path.name for path in folder.iterdir()) == ONE_RANK
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.json"]
        assert find_damage(folder) is None

        original, converted = stored_tensors(trained / LAST), stored_tensors(folder)
        assert original.keys() == converted.keys()
        for name, tensor in original.items():
            assert torch.equal(converted[name], tensor), name
        with safe_open(folder / ONE_RANK[2], framework="pt") as file:
            manifest = json.loads((folder / "manifest.json").read_text())
            assert {key: file.get_slice(key).get_shape() for key in file.keys()} == manifest["parameters"]  # noqa: SIM118
        assert read_state(folder) == read_state(trained / LAST)
        assert load_config([out / "config.json"]).run.out_dir == str(out)

        more = ["--config", str(out / "config.json"), "--resume", str(out), "--set", "schedule.max_steps=4"]
        result = run_ranks(1, TRAIN, more)
        assert result.returncode == 0, result.stderr
        assert f"continues {folder}" in result.stdout
        assert [row["step"] for row in read_metrics(out) if "loss" in row] == [4]

    def test_the_bytes_are_those_that_one_rank_saves(self, trained: Path, tmp_path: Path) -> None:
        """What safetensors itself writes, from a model with the same state."""
        convert(trained / LAST, tmp_path / "out")
        config = config_from_json(read_state(trained / LAST)[1], "state.json")
        config = config.model_copy(update={"backend": Config().backend})
        folder = tmp_path / "out" / LAST
        with alone() as world:
            backend = create_backend(build_model(config.model, 7), config, world, plan_batch(config, 1))
            state = load_training_state(folder, backend)
            saved = save_checkpoint(tmp_path / "saved", state, read_state(folder)[1], backend, world, 1)
        assert hashes(saved) == hashes(folder)

    def test_not_while_a_run_holds_the_folder(self, trained: Path, tmp_path: Path) -> None:
        with lock_run_folder(tmp_path), pytest.raises(ConfigError, match="in use by another run"):
            convert(trained, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_source_that_changes_meanwhile_leaves_nothing(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def vanished(*_: object) -> None:
            raise CheckpointError("rank_00001_weights.safetensors: cannot be read (no such file)")

        monkeypatch.setattr(conversion, "_read_piece", vanished)
        with pytest.raises(CheckpointError, match=r"cannot save .*step_00000003: rank 0: rank_00001.*cannot be read"):
            convert(trained, tmp_path / "out")
        assert not list((tmp_path / "out" / "checkpoints").iterdir())
        monkeypatch.undo()
        convert(trained, tmp_path / "out")
        assert find_damage(tmp_path / "out" / LAST) is None


@contextmanager
def alone() -> Iterator[World]:
    """This process as a world of one; the environment is put back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            patch.setenv(name, value)
        with join_world(RunConfig(device="cpu")) as world:
            yield world


def test_a_mistake_is_one_line(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, used = tmp_path / "nowhere", tmp_path / "used"
    shutil.copytree(run_folder, used)
    flip_a_bit(run_folder / LAST / "state.json")
    (tmp_path / "file").write_text("no checkpoint")
    mistakes: list[tuple[tuple[object, ...], str]] = [
        ((), "required: inspect|verify|prune|convert (see checkpoint.py --help)"),
        (("look", nowhere), "invalid choice: 'look' (choose from"),
        (("inspect",), "required: DIR (see checkpoint.py inspect --help)"),
        (("prune", used, "--keep", "0"), "--keep: must be at least 1, it is 0"),
        (("convert", used), "required: --out (see checkpoint.py convert --help)"),
        (("inspect", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("verify", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("prune", nowhere), f"{nowhere}: no checkpoint here; expected a run folder"),
        (("prune", used / LAST), "is a checkpoint; give the run folder"),
        (("convert", nowhere, "--out", tmp_path / "a"), f"{nowhere}: no checkpoint here"),
        (("convert", run_folder / LAST, "--out", tmp_path / "a"), "state.json: contents changed"),
        (("convert", run_folder, "--out", used), "already has checkpoints (step_00000003); name another"),
        (("convert", used, "--out", tmp_path / "file"), "file is no run folder; name a folder"),
        (("convert", used, "--out", tmp_path / "file" / "out"), "cannot make"),
        (("convert", tmp_path / "file", "--out", tmp_path / "a"), "file: cannot be read as a file of torch.save"),
    ]
    for arguments, expected in mistakes:
        done = in_process(monkeypatch, capsys, *arguments)
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ") and expected in done.stderr, done.stderr
    assert not (tmp_path / "a").exists()


def test_each_sub_command_has_help_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("inspect", "verify", "prune", "convert"):
        done = in_process(monkeypatch, capsys, name, "--help")
        assert f"example:\n  python launch/checkpoint.py {name} " in succeeded(done)


class NanoAttention(nn.Module):
    """Names and arithmetic of nanoGPT's, in a few lines."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mixed = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(x.shape))


class NanoMlp(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = NanoAttention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = NanoMlp(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp.c_fc(self.ln_2(x))
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return x + self.mlp.c_proj(0.5 * hidden * (1 + torch.tanh(inner)))


class NanoGpt(nn.Module):
    def __init__(self, vocab_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.model_args = {"n_layer": 2, "n_head": 3, "n_embd": 21, "block_size": 12}
        self.model_args |= {"bias": bias, "vocab_size": vocab_size, "dropout": 0.0}
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, 21),
                "wpe": nn.Embedding(12, 21),
                "h": nn.ModuleList(NanoBlock(21, 3, bias) for _ in range(2)),
                "ln_f": nn.LayerNorm(21, bias=bias),
            }
        )
        self.lm_head = nn.Linear(21, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


SETTINGS = {
    "learning_rate": 3e-3,
    "beta1": 0.8,
    "beta2": 0.97,
    "weight_decay": 0.3,
    "grad_clip": 0.7,
    "warmup_iters": 2,
    "lr_decay_iters": 50,
    "max_iters": 50,
    "min_lr": 3e-4,
    "batch_size": 4,
    "gradient_accumulation_steps": 5,
    "block_size": 12,
    "dataset": "made_up",
}
STEPS = 3


class NanoRun:
    """A training of ``NanoGpt`` with torch's AdamW, and the file that nanoGPT would leave."""

    def __init__(self, vocab_size: int = 89, *, bias: bool = True) -> None:
        self.model = NanoGpt(vocab_size, bias=bias)
        parameters = [parameter for _, parameter in self.model.named_parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": SETTINGS["weight_decay"]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.97))
        for step in range(STEPS):
            self.train_step(batch_of(step))

    def train_step(self, tokens: Tensor) -> None:
        logits = self.model(tokens[:, :-1])
        self.optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS["grad_clip"])
        self.optimizer.step()

    def content(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": self.model.model_args,
            "iter_num": STEPS,
            "best_val_loss": torch.tensor(4.2),
            "config": SETTINGS,
        }


def batch_of(seed: int) -> Tensor:
    return torch.randint(89, (4, 13), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def imported(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Path, Config, str]]:
    """Writes a ``ckpt.pt`` and converts it: the checkpoint's folder, the run's config, what was said."""

    def convert_content(content: dict[str, Any]) -> tuple[Path, Config, str]:
        torch.save(content, tmp_path / "ckpt.pt")
        done = convert(tmp_path / "ckpt.pt", tmp_path / "imported")
        assert find_damage(done.saved.folder) is None
        return done.saved.folder, load_config([tmp_path / "imported" / "config.json"]), str(done)

    return convert_content


Import = Callable[[dict[str, Any]], tuple[Path, Config, str]]


def expect_same_model(folder: Path, config: Config, nano: NanoGpt) -> None:
    tokens = batch_of(100)[:, :-1]
    loaded = load_model(folder, torch.device("cpu")).model
    with torch.no_grad():
        expected = nano(tokens)[..., : config.model.vocab_size]
        assert torch.allclose(loaded(tokens), expected, rtol=0, atol=1e-5)


class TestNanoGpt:
    def test_weights_moments_and_step_travel(self, imported: Import) -> None:
        """The next step of both programs on the same batch gives the same weights."""
        nano = NanoRun()
        folder, config, _ = imported(nano.content())
        expect_same_model(folder, config, nano.model)
        config = config.model_copy(update={"run": RunConfig(device="cpu", precision="fp32")})
        tokens = batch_of(200)
        with alone() as world:
            backend = create_backend(build_model(config.model, 7), config, world, plan_batch(config, 1))
            state = load_training_state(folder, backend)
            backend.accumulate(tokens[:, :-1], tokens[:, 1:], 1 / tokens[:, 1:].numel(), is_last=True)
            backend.step(1e-3)
        before = {name: tensor.clone() for name, tensor in nano.model.state_dict().items()}
        nano.train_step(tokens)
        assert (state.step, state.updates, state.samples, state.tokens) == (STEPS, STEPS, 0, STEPS * 4 * 5 * 12)
        assert state.data_sha256 is None
        parameters = dict(backend.model.named_parameters())
        for key, tensor in nano.model.state_dict().items():
            ours = parameters["wte.weight" if key == "lm_head.weight" else key.removeprefix("transformer.")]
            assert not torch.equal(tensor, before[key]), key
            assert not ours[tensor.shape[0] :].any(), key
            difference = (ours[: tensor.shape[0]] - tensor).abs()
            if key.endswith("c_attn.bias"):
                difference[21:42] = 0  # the key's bias changes no output: its gradient is nothing but rounding
            assert difference.max() <= 1e-6, key

    def test_settings_travel(self, imported: Import) -> None:
        _, config, _ = imported(NanoRun().content())
        assert config.optimizer.model_dump() == {
            "learning_rate": 3e-3,
            "betas": (0.8, 0.97),
            "eps": 1e-8,
            "weight_decay": 0.3,
            "grad_clip": 0.7,
        }
        schedule = config.schedule
        assert (schedule.warmup_steps, schedule.max_steps) == (2, 50)
        assert schedule.min_lr_ratio == pytest.approx(0.1)
        assert (config.batch.tokens_per_step, config.batch.micro_batch_size) == (240, 4)
        model = config.model
        assert (model.n_layer, model.n_head, model.n_embd, model.context_length, model.vocab_size) == (2, 3, 21, 12, 89)

    @pytest.mark.parametrize(
        ("settings", "schedule"),
        [
            ({}, (715, 19_073, 0.1)),
            ({"max_iters": 100}, (100, 100, 0.1)),
            ({"warmup_iters": 2000, "max_iters": 100}, (2000, 2000, 0.1)),
            ({"lr_decay_iters": 600, "max_iters": 100, "warmup_iters": 0}, (0, 600, 0.1)),
            ({"decay_lr": False, "max_iters": 20, "warmup_iters": 2000}, (0, 20, 1.0)),
        ],
    )
    def test_any_setting_may_be_missing(
        self, imported: Import, settings: dict[str, Any], schedule: tuple[int, int, float]
    ) -> None:
        _, config, said = imported({**NanoRun().content(), "config": settings})
        found = config.schedule
        assert (found.warmup_steps, found.max_steps, found.min_lr_ratio) == schedule
        assert ("the run ends with its learning rate's curve" in said) == (
            settings.get("max_iters") not in (None, found.max_steps)
        )
        assert config.batch == Config().batch
        assert "tokens: the file does not say" in said

    def test_without_biases(self, imported: Import) -> None:
        nano = NanoRun(bias=False)
        folder, config, said = imported(nano.content())
        expect_same_model(folder, config, nano.model)
        assert "biases: none in the file; they are zero" in said
        stored = stored_tensors(folder)
        assert not any(tensor.any() for name, tensor in stored.items() if name.endswith("bias"))

    def test_a_compiled_model_and_mask_buffers(self, imported: Import) -> None:
        nano = NanoRun()
        content = nano.content()
        model = {f"_orig_mod.{key}": tensor for key, tensor in content["model"].items()}
        model["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        folder, config, _ = imported({**content, "model": model})
        expect_same_model(folder, config, nano.model)

    def test_a_model_that_came_to_nothing(self, imported: Import) -> None:
        """NaN equals nothing, itself included: the tied weight is still one."""
        nano = NanoRun()
        nano.model.lm_head.weight.data.fill_(math.nan)
        folder, _, _ = imported(nano.content())
        assert stored_tensors(folder)["weight wte.weight"][:89].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_any_float_dtype(self, imported: Import, dtype: torch.dtype) -> None:
        nano = NanoRun()
        nano.model.to(dtype)
        folder, config, _ = imported(nano.content())
        assert stored_tensors(folder)["weight wpe.weight"].dtype == torch.float32
        expect_same_model(folder, config, nano.model.float())

    @pytest.mark.parametrize("optimizer", ["absent", "None", "empty"])
    def test_without_moments(self, imported: Import, optimizer: str) -> None:
        nano = NanoRun()
        content = nano.content()
        del content["optimizer"]
        if optimizer != "absent":
            content["optimizer"] = None if optimizer == "None" else {"state": {}, "param_groups": []}
        folder, config, said = imported(content)
        expect_same_model(folder, config, nano.model)
        assert "moments: none in the file; they are zero" in said
        assert not any(tensor.any() for name, tensor in stored_tensors(folder).items() if name.startswith("exp_avg"))
        assert read_state(folder)[0].updates == STEPS

    def test_gpt2s_padded_vocabulary_by_commands(self, corpus: Path, tmp_path: Path) -> None:
        """Converted, scored, sampled from and trained on, as a person would."""
        nano, out = NanoRun(vocab_size=50304), tmp_path / "out"
        torch.save(nano.content(), tmp_path / "ckpt.pt")
        said = succeeded(command("convert", tmp_path / "ckpt.pt", "--out", out))
        assert "vocabulary: 50304 rows are GPT-2's 50257 and padding" in said
        folder = out / LAST
        expect_same_model(folder, load_config([out / "config.json"]), nano.model)
        calls = (
            (TRAIN, ["--config", str(out / "config.json"), "--resume", str(out), "--set", f"data.path={corpus}"]),
            (
                LAUNCH / "evaluate.py",
                ["--checkpoint", str(folder), "--data", f"validation={corpus}", "--precision", "fp32"],
            ),
            (LAUNCH / "generate.py", ["--checkpoint", str(folder), "--max-new-tokens", "3"]),
        )
        calls[0][1].extend(["schedule.max_steps=4", "run.device=cpu", "run.precision=fp32", "evaluation.max_batches=2"])
        with ThreadPoolExecutor(max_workers=2) as pool:
            for done in pool.map(lambda call: run_ranks(1, *call), calls):
                assert done.returncode == 0, done.stdout + done.stderr
        assert [row["step"] for row in read_metrics(out) if "loss" in row] == [4]

    def test_code_in_the_file_is_refused_and_does_not_run(self, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "was_run"),)

        torch.save({**NanoRun().content(), "best_val_loss": Touch()}, tmp_path / "ckpt.pt")
        done = command("convert", tmp_path / "ckpt.pt", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "ckpt.pt: holds posix.mkdir, and only tensors and plain values are loaded" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt"]
        torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the file is what it is meant to be
        assert (tmp_path / "was_run").is_dir()


def changed(part: str, key: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Put a value into a part of the file; ``...`` takes the key out."""

    def change(content: dict[str, Any]) -> None:
        target = content
        for name in filter(None, part.split("/")):
            target = target[int(name) if name.isdigit() else name]
        if value is ...:
            del target[key]
        else:
            target[key] = value

    return change


BROKEN = [
    (changed("", "model", ...), "has no 'model'; expected the ckpt.pt of nanoGPT's train.py"),
    (changed("", "model", [1]), "'model' must be dict, found list"),
    (changed("", "iter_num", ...), "has no 'iter_num'"),
    (changed("", "iter_num", -1), "'iter_num' must be at least 0"),
    (changed("", "config", 5), "'config' must be dict, found int"),
    (changed("model", "transformer.wpe.weight", ...), "model: 'transformer.wpe.weight' is missing"),
    (changed("model", "transformer.h.1.ln_1.bias", ...), "model: 'transformer.h.1.ln_1.bias' is missing"),
    (changed("model", "transformer.extra", torch.ones(3)), "model: 'transformer.extra' has no place"),
    (changed("model", "transformer.ln_f.weight", torch.ones(22)), "ln_f.weight' has shape [22], expected [21]"),
    (changed("model", "transformer.ln_f.weight", torch.ones(21).int()), "'transformer.ln_f.weight' is torch.int32"),
    (changed("model", "transformer.ln_f.weight", 1.0), "'transformer.ln_f.weight' must be Tensor, found float"),
    (changed("model", "lm_head.weight", torch.ones(89, 21)), "'lm_head.weight' differs from"),
    (changed("model", "wpe.weight", torch.ones(12, 21)), "stands twice, with and without a prefix"),
    (changed("model_args", "n_embd", ...), "model_args: has no 'n_embd'"),
    (changed("model_args", "n_layer", 10**12), "'n_layer' is 1000000000000, and the file has 2 blocks"),
    (changed("model_args", "n_embd", 10**12), "[89, 1000000000000] for 'transformer.wte.weight', which has shape"),
    (changed("model_args", "n_head", 4), "must be a multiple of n_head (4)"),
    (changed("model_args", "vocab_size", True), "'vocab_size' must be int, found bool"),
    (changed("model_args", "bias", False), "bias' has no place in the GPT-2 of 'model_args'"),
    (changed("config", "learning_rate", "fast"), "'learning_rate' must be float, found str"),
    (changed("config", "weight_decay", -1), "optimizer.weight_decay: Input should be greater than or equal to 0"),
    (changed("optimizer", "state", ...), "optimizer: has no 'state'"),
    (changed("optimizer/state", 3, ...), "optimizer: state: has no 3"),
    (changed("optimizer/state/1", "exp_avg", torch.ones(2)), "state: 1: 'exp_avg' has shape [2], expected [12, 21]"),
    (changed("optimizer/state/1", "step", torch.tensor(9.0)), "'step' differs among parameters: [3, 9]"),
    (changed("optimizer/state/1", "step", "many"), "'step' must be a whole number, found 'many'"),
    (changed("optimizer/param_groups/1", "params", [1]), "optimizer: has 11 parameters, the model 28"),
]


@pytest.mark.parametrize(("change", "expected"), BROKEN, ids=[expected[:40] for _, expected in BROKEN])
def test_a_broken_file_of_nanogpt_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    content = copy.deepcopy(NanoRun().content())
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        convert(tmp_path / "ckpt.pt", tmp_path / "out")
    assert expected in str(caught.value)
    assert "ckpt.pt" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_damage_to_a_file_of_nanogpt_is_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {"wte": torch.zeros(3)}, "config": {"learning_rate": 1e-3}}, path)
    content = path.read_bytes()
    for at in range(600):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match="ckpt.pt") as caught:
            convert(path, tmp_path / "out")
        assert len(str(caught.value).splitlines()) == 1
