"""Define the groups of model files."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import launch.checkpoint
import launch.evaluate
import launch.export
import launch.generate
import launch.plan
import launch.report
import launch.train
from benchmarks.fuzz.damage import change_value, damage_folder
from benchmarks.fuzz.data_groups import write_tiny_run
from benchmarks.fuzz.trial import Command, Group
from data_tools.storage.json_values import sha256_of_json
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.layout import MANIFEST_FILE, list_checkpoints
from pipeline.checkpoint.loading import load_model
from pipeline.checkpoint.verification import verify_checkpoints
from pipeline.interop.hugging_face.exporting import export_checkpoint

_TRAIN = "--config {fixed}/run.json --set run.out_dir={out} "
_SMALL = "model.n_layer=1 model.n_embd=8 batch.tokens_per_step=64 schedule.max_steps=1 evaluation.max_batches=1"
_ODD_TENSORS: tuple[Any, ...] = (
    *(torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.full((2, 2), float("nan")), torch.zeros(2, 2).int()),
    *(torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.complex64), torch.zeros(3, 3).to_sparse(), None, "x", 7, [1]),
)


def _checkpoint(line: str, check: Callable[[Path], object] | None = None) -> Command:
    return Command(launch.checkpoint.main, line, check=check)


def _verify(run_folder: Path) -> None:
    verify_checkpoints(run_folder, lambda line: None)


def _write_run(source: Path, fixed: Path) -> None:
    write_tiny_run(fixed)
    shutil.copytree(fixed / "run", source / "run")


def _write_config(source: Path, fixed: Path) -> None:
    write_tiny_run(fixed)
    shutil.copy(fixed / "run.json", source)


def _write_export(source: Path, fixed: Path) -> None:
    write_tiny_run(fixed)
    source.rmdir()
    export_checkpoint(fixed / "run", source, "float32")


def _write_shards_of_pickles(source: Path, fixed: Path) -> None:
    """Write a model in the format before safetensors: two files and an index, without the files of the tokenizer."""
    _write_export(source, fixed)
    weights = {f"transformer.{name}": tensor for name, tensor in _weights(fixed).items()}
    weights = {name: tensor.t() if _is_conv1d(name) else tensor for name, tensor in weights.items()}
    files = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in source.iterdir():
        if path.name != "config.json" and not path.name.startswith("pytorch_model"):
            path.unlink()


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _weights(fixed: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the tiny run, without padding rows."""
    model = load_model(fixed / "run", torch.device("cpu")).model
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {**weights, "wte.weight": weights["wte.weight"][: model.config.vocab_size].clone()}


def _write_nanogpt(source: Path, fixed: Path) -> None:
    write_tiny_run(fixed)
    weights = _weights(fixed)
    ordered = sorted(weights, key=lambda name: weights[name].dim() < 2)
    matrices = sum(weights[name].dim() >= 2 for name in ordered)
    state = {
        number: {"step": torch.tensor(5.0), "exp_avg": weights[name] * 0, "exp_avg_sq": weights[name].square()}
        for number, name in enumerate(ordered)
    }
    groups = [{"params": list(range(matrices))}, {"params": list(range(matrices, len(ordered)))}]
    content = {
        "model": {f"_orig_mod.transformer.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32, "vocab_size": 50257, "bias": True},
        "iter_num": 5,
        "best_val_loss": torch.tensor(4.0),
        "config": {"learning_rate": 1e-3, "batch_size": 2, "block_size": 32, "gradient_accumulation_steps": 1},
    }
    torch.save(content, source / "ckpt.pt")


def damage_run(folder: Path, stream: random.Random) -> str:
    """Damage a run folder. Half of the time, compute hashes and sizes again, so that readers accept the files."""
    done = _damage_model(folder, stream)
    if stream.random() < 0.5:
        return done
    for checkpoint in list_checkpoints(folder / "run"):
        path = checkpoint / MANIFEST_FILE
        try:
            manifest = json.loads(path.read_bytes())
            manifest.pop("sha256", None)
            for name, entry in manifest["files"].items():
                file = checkpoint / name
                entry |= {"bytes": file.stat().st_size, "sha256": sha256_of_file(file), "finite": False}
            path.write_text(json.dumps({**manifest, "sha256": sha256_of_json(manifest)}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return done
    return f"{done}; hashes match"


def _damage_model(folder: Path, stream: random.Random) -> str:
    """Damage a safetensors header, a pickle, or any file as ``damage_folder`` does."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin"))
    if not files or stream.random() < 0.5:
        return damage_folder(folder, stream)
    path = stream.choice(files)
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(change_value(json.loads(content[8 : 8 + length]), stream)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        return f"{path.relative_to(folder)}: header"
    content = torch.load(path, weights_only=True)
    _change_pickled(content, stream)
    torch.save(content, path)
    return f"{path.relative_to(folder)}: pickled value"


def _change_pickled(content: dict[Any, Any], stream: random.Random) -> None:
    """Replace, rename or delete a value of a dict, at any depth."""
    key = stream.choice(list(content))
    inner = content[key]
    if isinstance(inner, dict) and inner and stream.random() < 0.85:
        _change_pickled(inner, stream)
    elif stream.random() < 0.2:
        del content[key]
    elif stream.random() < 0.2:
        content[stream.choice((f"module.{key}", f"{key}2", 3))] = content.pop(key)
    elif isinstance(inner, torch.Tensor) and inner.ndim and stream.random() < 0.5:
        content[key] = stream.choice((inner * float("inf"), inner.double(), inner.half(), inner[:0], inner.int()))
    else:
        content[key] = stream.choice((*_ODD_TENSORS, change_value(0, stream)))


_EVALUATE = "--checkpoint {source}/run --tasks validation --data validation={fixed}/data --device cpu"

MODEL_GROUPS = (
    Group(
        "checkpoint",
        _write_run,
        (
            *map(_checkpoint, ("inspect {source}/run", "inspect {source}/run --json", "prune {source}/run --dry-run")),
            _checkpoint("verify {source}/run"),
            _checkpoint("convert {source}/run --out {out}", _verify),
            Command(launch.export.main, "--checkpoint {source}/run --out {out}"),
        ),
        damage_run,
    ),
    Group(
        "run",
        _write_run,
        (
            Command(launch.evaluate.main, _EVALUATE, continues_in_source=True),
            Command(launch.generate.main, "--checkpoint {source}/run --max-new-tokens 2 --device cpu"),
            Command(launch.report.main, "{source}/run --out {out}"),
            Command(launch.train.main, _TRAIN + "--init-from {source}/run", check=_verify),
            Command(
                launch.train.main,
                "--config {fixed}/run.json --set run.out_dir={source}/run schedule.max_steps=2",
                continues_in_source=True,
            ),
        ),
        damage_run,
    ),
    Group(
        "run-config",
        _write_config,
        (
            Command(launch.plan.main, "--config {source}/run.json --world-size 1"),
            Command(
                launch.train.main, f"--config {{source}}/run.json --set run.out_dir={{out}} {_SMALL}", check=_verify
            ),
        ),
    ),
    Group(
        "hf-model",
        _write_export,
        (
            Command(launch.export.main, "--from-hf {source} --out {out}", check=_verify),
            Command(launch.train.main, _TRAIN + "--init-from {source}", check=_verify),
        ),
        _damage_model,
    ),
    Group(
        "hf-pickles",
        _write_shards_of_pickles,
        (Command(launch.export.main, "--from-hf {source} --out {out}", check=_verify),),
        _damage_model,
    ),
    Group(
        "nanogpt-model",
        _write_nanogpt,
        (_checkpoint("convert {source}/ckpt.pt --out {out}", _verify),),
        _damage_model,
    ),
)
