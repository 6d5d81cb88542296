"""nanoGPT's ``ckpt.pt`` is imported completely, and a malformed one is a one-line error."""

from __future__ import annotations

import copy
import math
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.backends import create_backend
from pipeline.checkpoint.loading import load_model, load_training_state
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import load_config
from pipeline.config.schema import Config, OptimizerConfig, RunConfig
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError
from pipeline.interop.nanogpt import import_nanogpt
from pipeline.model.gpt2 import build_model
from pipeline.run_folder.metrics import read_metrics
from tests.pipeline.checkpoint.conftest import stored_tensors
from tests.support.runs import REPOSITORY, TRAIN, run_ranks

LAUNCH = REPOSITORY / "launch"
LAST = "checkpoints/step_00000003"


def convert_by_command(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return run_ranks(1, LAUNCH / "checkpoint.py", ["convert", str(source), "--out", str(out)])


class NanoAttention(nn.Module):
    """nanoGPT's names and arithmetic in a few lines."""

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
        self.approximate = "tanh"
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
        return x + self.mlp.c_proj(F.gelu(hidden, approximate=self.mlp.approximate))


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


@dataclass
class GPTConfig:
    """The class of this name in build-nanogpt."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int


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
    """Trains ``NanoGpt`` with torch's AdamW, and returns the contents of the file that nanoGPT would write."""

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
    """Return a function that writes and imports a ``ckpt.pt``, and returns checkpoint, config and printed text."""

    def convert_content(content: dict[str, Any]) -> tuple[Path, Config, str]:
        torch.save(content, tmp_path / "ckpt.pt")
        done = import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "imported")
        assert find_damage(done.saved.folder) is None
        return done.saved.folder, load_config([tmp_path / "imported" / "config.json"]), str(done)

    return convert_content


Import = Callable[[dict[str, Any]], tuple[Path, Config, str]]


def assert_same_model(folder: Path, config: Config, nano: NanoGpt) -> None:
    tokens = batch_of(100)[:, :-1]
    loaded = load_model(folder, torch.device("cpu")).model
    with torch.no_grad():
        expected = nano(tokens)[..., : config.model.vocab_size]
        assert torch.allclose(loaded.logits(tokens), expected, rtol=0, atol=1e-5)


class TestNanoGpt:
    def test_weights_moments_and_step_are_imported(self, imported: Import, world: World) -> None:
        """The next step of both programs on the same batch gives the same weights."""
        nano = NanoRun()
        folder, config, _ = imported(nano.content())
        assert_same_model(folder, config, nano.model)
        config = config.model_copy(update={"run": RunConfig(device="cpu", precision="fp32")})
        tokens = batch_of(200)
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
                difference[21:42] = 0  # the key's bias does not change the output, so its gradient is only rounding
            assert difference.max() <= 1e-6, key

    def test_settings_are_imported(self, imported: Import) -> None:
        _, config, _ = imported(NanoRun().content())
        assert config.run.name.endswith("/ckpt.pt"), "the folder and the file that were imported"
        assert config.optimizer.model_dump() == {
            **OptimizerConfig().model_dump(),
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
        assert_same_model(folder, config, nano.model)
        assert "biases: none in the file; they are zero" in said
        stored = stored_tensors(folder)
        assert not any(tensor.any() for name, tensor in stored.items() if name.endswith("bias"))

    @pytest.mark.parametrize("prefix", ["module.", "_module.", "model.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_of_wrappers(self, imported: Import, prefix: str) -> None:
        nano = NanoRun()
        content = nano.content()
        folder, config, _ = imported(
            {**content, "model": {prefix + key: tensor for key, tensor in content["model"].items()}}
        )
        assert_same_model(folder, config, nano.model)

    def test_build_nanogpts_file(self, imported: Import, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its sizes are in an object of a class, which is read without running the code of the class."""
        nano = NanoRun()
        monkeypatch.setattr("__main__.GPTConfig", GPTConfig, raising=False)
        monkeypatch.setattr(GPTConfig, "__module__", "__main__")
        sizes = {key: nano.model.model_args[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        content = {"model": nano.model.state_dict(), "config": GPTConfig(**sizes), "step": 250, "val_loss": 4.2}
        folder, config, said = imported(content)
        assert_same_model(folder, config, nano.model)
        assert read_state(folder)[0].step == 250
        assert "activation" not in said, "its GELU is the one with tanh"
        assert "moments: none in the file" in said

    def test_the_differences_are_said_and_measured(self, imported: Import) -> None:
        """The size of the difference in GELU is that of nanoGPT's own model with either GELU."""
        nano = NanoRun()
        _, config, said = imported({**nano.content(), "config": {**SETTINGS, "seed": 7, "warmup_iters": 9}})
        tokens = torch.randint(89, (39,), generator=torch.Generator().manual_seed(0))[None, :13]
        losses = []
        for approximate in ("none", "tanh"):
            for block in nano.model.transformer.h:
                block.mlp.approximate = approximate
            with torch.no_grad():
                losses.append(float(F.cross_entropy(nano.model(tokens[:, :-1])[0], tokens[0, 1:])))
        assert f"has a loss of {losses[0]:.4f} there and {losses[1]:.4f} here" in said
        assert "settings: not imported: dataset, seed" in said
        assert "warm-up: step k has k / 9 of the peak rate here, k / 10 in nanoGPT" in said
        assert "the position in the data starts at 0" in said

    @pytest.mark.parametrize("rows", [50304, 50432])
    def test_rows_beyond_the_tokenizer_are_cut(self, imported: Import, rows: int) -> None:
        nano = NanoRun(vocab_size=rows)
        folder, config, said = imported(nano.content())
        assert config.model.vocab_size == 50257
        assert f"vocabulary: {rows} rows there; GPT-2's tokenizer has 50257 tokens" in said
        for name, tensor in stored_tensors(folder).items():
            if name.endswith("wte.weight"):
                assert tensor[:50257].any(), name
                assert not tensor[50257:].any(), name
        assert_same_model(folder, config, nano.model)

    def test_a_compiled_model_and_mask_buffers(self, imported: Import) -> None:
        nano = NanoRun()
        content = nano.content()
        model = {f"_orig_mod.{key}": tensor for key, tensor in content["model"].items()}
        model["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        folder, config, _ = imported({**content, "model": model})
        assert_same_model(folder, config, nano.model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_any_float_dtype(self, imported: Import, dtype: torch.dtype) -> None:
        nano = NanoRun()
        nano.model.to(dtype)
        folder, config, _ = imported(nano.content())
        assert stored_tensors(folder)["weight wpe.weight"].dtype == torch.float32
        assert_same_model(folder, config, nano.model.float())

    @pytest.mark.parametrize("optimizer", ["absent", "None", "empty"])
    def test_without_moments(self, imported: Import, optimizer: str) -> None:
        nano = NanoRun()
        content = nano.content()
        del content["optimizer"]
        if optimizer != "absent":
            content["optimizer"] = None if optimizer == "None" else {"state": {}, "param_groups": []}
        folder, config, said = imported(content)
        assert_same_model(folder, config, nano.model)
        assert "moments: none in the file; they are zero" in said
        assert not any(tensor.any() for name, tensor in stored_tensors(folder).items() if name.startswith("exp_avg"))
        assert read_state(folder)[0].updates == STEPS

    def test_gpt2s_padded_vocabulary_by_commands(self, corpus: Path, tmp_path: Path) -> None:
        """The imported run can be trained, evaluated and sampled from."""
        nano, out = NanoRun(vocab_size=50432), tmp_path / "out"
        torch.save(nano.content(), tmp_path / "ckpt.pt")
        done = convert_by_command(tmp_path / "ckpt.pt", out)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "vocabulary: 50432 rows there" in done.stdout
        folder = out / LAST
        assert_same_model(folder, load_config([out / "config.json"]), nano.model)
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

    def test_code_in_the_file_is_rejected_and_not_run(self, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "was_run"),)

        torch.save({**NanoRun().content(), "best_val_loss": Touch()}, tmp_path / "ckpt.pt")
        done = convert_by_command(tmp_path / "ckpt.pt", tmp_path / "out")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "ckpt.pt: holds posix.mkdir, and only tensors and plain values are loaded" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt"]
        torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the file would indeed have run it
        assert (tmp_path / "was_run").is_dir()


def changed(section: str, key: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets a value in a section of the file, or deletes the key if the value is ``...``."""

    def change(content: dict[str, Any]) -> None:
        target = content
        for name in filter(None, section.split("/")):
            target = target[int(name) if name.isdigit() else name]
        if value is ...:
            del target[key]
        else:
            target[key] = value

    return change


BROKEN = [
    (changed("", "model", ...), "has no 'model'; its keys are 'optimizer', 'model_args', 'iter_num'"),
    (changed("model", "transformer.ln_f.weight", torch.full((21,), math.nan)), "ln_f.weight': 21 of 21 numbers are"),
    (changed("model", "lm_head.weight", torch.full((89, 21), math.inf)), "'lm_head.weight': 1869 of 1869 numbers are"),
    (changed("optimizer/state/1", "exp_avg", torch.full((12, 21), math.nan)), "state: 1: 'exp_avg': 252 of 252 num"),
    (changed("optimizer/state/1", "exp_avg_sq", -torch.ones(12, 21)), "'exp_avg_sq' holds negative numbers; remove"),
    (changed("", "model", [1]), "'model' must be dict, found list"),
    (changed("", "iter_num", ...), "has no 'iter_num'"),
    (changed("", "iter_num", -1), "'iter_num' must be at least 0"),
    (changed("", "config", 5), "'config' must be dict, found int"),
    (changed("model", "transformer.wpe.weight", ...), "model: 'transformer.wpe.weight' is missing"),
    (changed("model", "transformer.h.1.ln_1.bias", ...), "model: 'transformer.h.1.ln_1.bias' is missing"),
    (changed("model", "transformer.extra", torch.ones(3)), "model: 'transformer.extra' does not exist in the GPT-2"),
    (changed("model", "transformer.ln_f.weight", torch.ones(22)), "ln_f.weight' has shape [22], expected [21]"),
    (changed("model", "transformer.ln_f.weight", torch.ones(21).int()), "'transformer.ln_f.weight' is torch.int32"),
    (changed("model", "transformer.ln_f.weight", 1.0), "'transformer.ln_f.weight' must be Tensor, found float"),
    (changed("model", "lm_head.weight", torch.ones(89, 21)), "'lm_head.weight' differs from"),
    (changed("model", "wpe.weight", torch.ones(12, 21)), "is stored twice, with and without a prefix"),
    (changed("model_args", "n_embd", ...), "model_args: has no 'n_embd'"),
    (changed("model_args", "n_layer", 10**12), "'n_layer' is 1000000000000, and the weights have 2 blocks"),
    (
        changed("model_args", "n_embd", 10**12),
        "'vocab_size' 89 and 'n_embd' 1000000000000 contradict 'transformer.wte.weight'",
    ),
    (changed("model_args", "n_head", 4), "must be a multiple of n_head (4)"),
    (changed("model_args", "vocab_size", True), "'vocab_size' must be int, found bool"),
    (changed("model_args", "bias", False), "bias' does not exist in the GPT-2 of 'model_args'"),
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
        import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "out")
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
            import_nanogpt(path, tmp_path / "out")
        assert len(str(caught.value).splitlines()) == 1
