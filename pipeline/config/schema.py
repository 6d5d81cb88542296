"""Define the schema of the run config. The default values are the recipe for GPT-2 124M."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data_tools.options import BadRows, Deduplication, ShardFormat, SourceKind
from data_tools.vocabulary import GPT2_VOCAB_SIZE

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmptyText = Annotated[str, Field(min_length=1)]


def _parse_path(text: str) -> str:
    """Return a path without a leading ~. The shell does not replace the ~ in ``--set run.out_dir=~/runs``."""
    if "\0" in text:
        raise ValueError("no file can have this name, because it holds a NUL character")
    return os.path.expanduser(text)


PathText = Annotated[NonEmptyText, AfterValidator(_parse_path)]

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "amp_bf16", "amp_fp16", "bf16"]
TaskName = Literal[
    "validation",
    "wikitext2",
    "lambada",
    "hellaswag",
    "hellaswag_completion",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "core",
]
#: DeepSpeed's key for ZeRO++ hpZ: the number of consecutive ranks that share secondary shards of the weights.
HPZ = "zero_hpz_partition_size"
TASK_NAME = re.compile(r"[\w.-]+")  # a task's name is also the name of its result file
SinkName = Literal["jsonl", "tensorboard", "console", "csv", "wandb", "mlflow"]
Preset = Literal["gpt2-tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# OpenAI's four sizes are those of Radford et al. 2019, table 2.
MODEL_PRESETS: dict[Preset, dict[str, int]] = {
    "gpt2-tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context_length": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "context_length": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "context_length": 1024},
}


#: The keys of ``ModelConfig`` that determine the shapes of the model and its number of attention heads.
MODEL_SIZES = ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")


def describe_model(model: Mapping[str, Any]) -> str:
    """Return a text with a model's preset, and the sizes that differ from this preset.

    Args:
        model: the section ``model`` of a resolved config. Keys may be missing.
    """
    preset = str(model.get("preset", "unknown"))
    sizes = next((sizes for name, sizes in MODEL_PRESETS.items() if name == preset), {})
    usual = {"vocab_size": GPT2_VOCAB_SIZE, **sizes}
    other = [f"{key} {model[key]}" for key in MODEL_SIZES if key in model and model[key] != usual.get(key)]
    return f"{preset} with {', '.join(other)}" if other else preset


class Section(BaseModel):
    """The base class of all sections of the config.

    A section is immutable, refuses unknown keys, and does not convert texts such as "3" to numbers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def stated(self, key: str) -> str:
        """Return a key with its value for an error message. The text says if the value is a default."""
        return f"{key} ({getattr(self, key)}{'' if key in self.model_fields_set else ', the default'})"


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _number_as_text(given: Any) -> Any:
    """Convert a number to text, because pydantic takes 1 for the literal True and 0 for the literal False."""
    return str(given) if type(given) in (int, float) else given


class RunConfig(Section):
    """The name and output folder of the run, and settings for the computation."""

    name: str = Field("gpt2", description="Name of the run in logs and TensorBoard.")
    out_dir: PathText = Field("runs/gpt2", description="Run folder for metrics, checkpoints and results.")
    seed: NonNegativeInt = Field(1337, description="Seed of the initial weights, the data order and dropout.")
    device: Device = Field("auto", description="`auto` chooses cuda if available, else mps, else cpu.")
    precision: Precision = Field(
        "amp_bf16",
        description="`amp_*` keeps fp32 weights and computes under autocast. With `bf16`, the model computes "
        "with bf16 weights, and the optimizer updates fp32 master weights.",
    )
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_number_as_text)] = Field(
        "auto",
        description="Compile the model and the loss with torch.compile. `auto` compiles every run on CUDA, and runs of "
        "more than ten minutes on a CPU. Without a working compiler, the model is not compiled.",
    )
    loss_in_blocks: Annotated[Literal["auto", "kept", True, False], BeforeValidator(_number_as_text)] = Field(
        "auto",
        description="Compute the logits and the loss in blocks of the vocabulary. `true` saves memory, but computes "
        "the logits twice. `kept` keeps the logits in memory, and is faster on some CPUs. On a CPU, `auto` measures "
        "at the start of a compiled run whether `kept` is faster. In all other runs, `auto` means `false`.",
    )
    working_dir: NonEmptyText | None = Field(
        None,
        description="Folder in which the run was started. The program sets this key. Later commands look for a "
        "relative data path in their own current folder, and then in `working_dir`.",
    )
    rank_timeout_s: PositiveInt = Field(
        60,
        description="Longest time in seconds that a rank may be silent or make no progress. After this time, the run "
        "ends and names the rank.",
    )

    @property
    def compiles(self) -> bool:
        """Return whether torch.compile compiles the model. Returns False if ``compile`` is ``auto``."""
        return self.compile is True


class ModelConfig(Section):
    """The architecture of the model."""

    preset: Preset = Field("gpt2", description="The preset gives all sizes that the config does not set.")
    n_layer: PositiveInt = Field(description="Number of transformer blocks.")
    n_head: PositiveInt = Field(description="Number of attention heads. `n_embd` must be a multiple of it.")
    n_embd: PositiveInt = Field(description="Width of the residual stream.")
    context_length: PositiveInt = Field(
        description="Longest context in tokens, which is the number of learned position embeddings."
    )
    vocab_size: PositiveInt = Field(
        GPT2_VOCAB_SIZE, description="Vocabulary size of the tokenizer. The model pads it to a multiple of 128."
    )
    dropout: Fraction = Field(0.0, description="Dropout of embeddings, attention weights and residual branches.")
    reset_positions_at: NonNegativeInt | None = Field(
        None,
        description="Token id at which positions restart from 0. GPT-2's end of text is 50256. Attention still "
        "includes earlier tokens. `null`: positions do not restart.",
    )
    activation_checkpointing: bool | PositiveInt = Field(
        False,
        description="Recompute activations in the backward pass to save memory. `true` recomputes all blocks. A "
        "number n recomputes the first of every n blocks.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # pydantic reports the wrong type
        default: Preset = cls.model_fields["preset"].default
        preset = given.get("preset", default)
        sizes = MODEL_PRESETS[preset] if isinstance(preset, str) and preset in MODEL_PRESETS else MODEL_PRESETS[default]
        return {**sizes, **given}

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _check_boolean_or_period(cls, given: Any) -> Any:
        if not isinstance(given, int) or (given < 1 and given is not False):
            raise ValueError(f"must be true, false or a whole number from 1, found {json.dumps(given, default=str)}")
        return given

    @model_validator(mode="after")
    def _check_sizes(self) -> ModelConfig:
        mistakes = []
        if self.n_embd % self.n_head:
            mistakes.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.activation_checkpointing > self.n_layer:
            mistakes.append(
                f"activation_checkpointing ({self.activation_checkpointing}) must not exceed n_layer ({self.n_layer}); "
                "n recomputes the first of every n blocks"
            )
        if self.reset_positions_at is not None and self.reset_positions_at >= self.vocab_size:
            mistakes.append(
                f"{self.stated('reset_positions_at')} must be a token, less than {self.stated('vocab_size')}"
            )
        _refuse(mistakes)
        return self

    def __str__(self) -> str:
        return describe_model(self.model_dump())

    def recomputes_block(self, index: int) -> bool:
        """Return whether the backward pass recomputes the activations of the block ``index``."""
        every = int(self.activation_checkpointing)
        return every > 0 and index % every == 0


class TokenizeConfig(Section):
    """Options that the command ``run`` passes to the command ``tokenize``.

    With ``null``, ``tokenize`` uses its own default.
    """

    source: SourceKind = Field("fineweb-edu", description="Where the documents come from.")
    input: list[PathText] = Field([], description="Files, folders, or the name of a dataset.")
    format: ShardFormat | None = Field(None, description="File format of the shards.")
    val_fraction: Fraction | None = Field(None, description="Fraction of the documents held out for validation.")
    shard_tokens: PositiveInt | None = Field(None, description="Largest number of tokens per shard.")
    deduplicate: Deduplication | None = Field(
        None, description="`exact` leaves out documents that are equal to an earlier document."
    )
    on_bad_rows: BadRows | None = Field(
        None,
        description="What to do with a row that cannot be read. `skip` reports it and continues. `stop` ends with an "
        "error.",
    )
    workers: PositiveInt | None = Field(None, description="Number of processes that encode documents.")
    limit_documents: PositiveInt | None = Field(None, description="Largest number of documents to tokenize.")
    limit_bytes: PositiveInt | None = Field(
        None, description="Stop when the documents together have at least this many UTF-8 bytes."
    )


class MixtureComponent(Section):
    """One dataset of a mixture."""

    path: PathText = Field(description="A folder with a manifest.json.")
    weight: PositiveFloat = Field(description="The dataset's share of the samples is weight / sum of all weights.")
    name: str = Field(pattern=r"^[\w.-]+$", description="Name in the metrics (default: the folder's name).")

    @model_validator(mode="before")
    @classmethod
    def _name_after_folder(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("path"), str):
            return {"name": PurePath(given["path"]).name, **given}
        return given


class DataConfig(Section):
    """The tokenized datasets to train on."""

    path: PathText | None = Field("data/fineweb-edu", description="Dataset folder, which has a `manifest.json`.")
    mixture: list[MixtureComponent] | None = Field(
        None,
        min_length=1,
        description='Several datasets instead of `path`: a list of {"path": folder, "weight": number, "name": text}. '
        "Samples are drawn in proportion to the weights. Metrics show the names. The default name is the folder's "
        "name.",
    )
    seq_len: PositiveInt | None = Field(None, description="Tokens per sample. `null`: `model.context_length`.")
    verify: bool = Field(True, description="Check the hash of every shard before training.")

    @model_validator(mode="before")
    @classmethod
    def _replace_default_path(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mixture") is not None and "path" not in given:
            return {**given, "path": None}
        return given

    @model_validator(mode="after")
    def _check_path_or_mixture(self) -> DataConfig:
        if self.path is not None and self.mixture is not None:
            raise ValueError(
                f"path ({self.path}) and mixture are both given; set one of data.path, data.mixture to null"
            )
        if self.path is None and self.mixture is None:
            raise ValueError("neither path nor mixture is given; set one of data.path, data.mixture")
        for key in ("path", "name"):
            values = [getattr(component, key) for component in self.mixture or ()]
            if repeated := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"mixture: two datasets have the {key} {repeated[0]}; give each its own")
        return self

    @property
    def components(self) -> list[MixtureComponent]:
        """Return the datasets of the mixture, or the dataset at ``path`` if there is no mixture."""
        if self.mixture is not None:
            return self.mixture
        assert self.path is not None
        return [MixtureComponent.model_construct(path=self.path, weight=1.0, name=PurePath(self.path).name)]


class BatchConfig(Section):
    """The batch size. The program computes the number of gradient accumulation steps."""

    tokens_per_step: PositiveInt = Field(
        524_288,
        description="Target tokens per optimizer step, summed over all ranks. A multiple of `micro_batch_size` x "
        "`data.seq_len` x number of ranks.",
    )
    micro_batch_size: PositiveInt = Field(16, description="Samples per forward pass on each rank.")


class MuonConfig(Section):
    """Settings for Muon, which updates the matrices of the transformer blocks."""

    momentum: Fraction = Field(0.95, description="Decay rate of the running mean of the gradients.")
    nesterov: bool = Field(True, description="Use Nesterov momentum.")
    iterations: PositiveInt = Field(5, le=20, description="Newton-Schulz iterations per matrix.")
    split_qkv: bool = Field(
        True, description="Orthogonalize the projections to queries, keys and values as three matrices, not as one."
    )


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="`adamw` updates all parameters with AdamW. `muon` updates the matrices of the transformer blocks "
        "with Muon, and all other parameters with AdamW. The same learning rate and weight decay suit both.",
    )
    learning_rate: PositiveFloat = Field(6e-4, description="Peak learning rate, reached after warm-up.")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), strict=False, description="Decay rates of AdamW's two moments."
    )
    eps: PositiveFloat = Field(1e-8, description="AdamW adds this number to the square root of the second moment.")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="Decoupled weight decay. It does not apply to biases and LayerNorm weights."
    )
    grad_clip: NonNegativeFloat = Field(
        1.0, description="Clip the global gradient norm to this value. 0 turns clipping off."
    )
    muon: MuonConfig = MuonConfig()


class AveragingConfig(Section):
    """An average of the weights over the training steps. The average does not affect training."""

    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an exponential moving average of the fp32 weights, with this decay per step (for example "
        "0.999). It needs 4 bytes per parameter, sharded like the weights. The decay is smaller at the beginning of a "
        "run. `null`: no average.",
    )


class ScheduleConfig(Section):
    """The learning rate schedule and the length of the run. By default, a run trains on 10B tokens."""

    name: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine",
        description="The curve after the warm-up. `cosine` and `linear` decay over all remaining steps. `wsd` "
        "(warm-up, stable, decay) stays at the peak, then decays over the last `decay_steps` steps. `constant` stays "
        "at the peak.",
    )
    warmup_steps: NonNegativeInt = Field(715, description="Optimizer steps of linear warm-up.")
    max_steps: PositiveInt = Field(19_073, description="Optimizer steps of the whole run.")
    decay_steps: PositiveInt | None = Field(
        None,
        description="For `wsd`: number of steps of the decay. `null`: a fifth of the run.",
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="For `wsd`: the curve of the decay. `null`: `linear`."
    )
    min_lr_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Learning rate at the end of the decay, as a fraction of the peak. `constant` ignores it.",
    )
    stop_at_val_loss: PositiveFloat | None = Field(
        None,
        description="End the run when the validation loss is at most this value. The validation before the first step "
        "does not count. `null` turns this off.",
    )
    stop_after_evaluations: PositiveInt | None = Field(
        None,
        description="End the run after this many evaluations in a row without a new lowest validation loss. The "
        "validation before the first step does not count. `null` turns this off.",
    )

    @model_validator(mode="after")
    def _check_steps(self) -> ScheduleConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"{self.stated('warmup_steps')} must not exceed {self.stated('max_steps')}")
        given = [key for key in ("decay_steps", "decay_shape") if getattr(self, key) is not None]
        if given and self.name != "wsd":
            raise ValueError(
                f'{" and ".join(given)}: only name "wsd" has a separate decay, and name is "{self.name}"; '
                'set name to "wsd", or leave out what it does not use'
            )
        if self.decay_start < self.warmup_steps:
            raise ValueError(
                f"{self.stated('warmup_steps')} and decay_steps ({self.max_steps - self.decay_start}) must not "
                f"exceed {self.stated('max_steps')} together"
            )
        return self

    @property
    def decay_start(self) -> int:
        """Return the step at which the learning rate begins to fall, or ``max_steps`` if it never falls."""
        if self.name == "constant":
            return self.max_steps
        if self.name == "wsd":
            return self.max_steps - (self.decay_steps or math.ceil(self.max_steps / 5))
        return self.warmup_steps

    def __str__(self) -> str:
        if self.name == "constant":
            return f"warm-up {self.warmup_steps:,} steps, then constant to step {self.max_steps:,}"
        decay = f"{self.name} to {self.min_lr_ratio:g} of the peak at step {self.max_steps:,}"
        if self.name == "wsd":
            decay = f"constant to step {self.decay_start:,}, {self.decay_shape or 'linear'}" + decay.removeprefix("wsd")
        return f"warm-up {self.warmup_steps:,} steps, {decay}"


class DdpConfig(Section):
    """Settings for DDP, which keeps all weights on every rank and all-reduces the gradients."""

    bucket_cap_mb: PositiveInt = Field(25, description="Size of a gradient bucket in MiB.")


class FsdpConfig(Section):
    """Settings for FSDP2 (``fully_shard``), which shards the weights, gradients and optimizer state of each block."""

    reshard_after_forward: bool = Field(
        True,
        description="Free a block's gathered weights after its forward pass. `false` needs more memory, but gathers "
        "each weight only once per step.",
    )
    shard_group_size: PositiveInt | None = Field(
        None,
        description="Number of consecutive ranks that together hold one copy of the model, for example the GPUs of "
        "one node. The number of ranks must be a multiple of it. `null`: all ranks together hold one copy.",
    )


class BackendConfig(Section):
    """The library that distributes the training. All libraries give the same results."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field("ddp", description="PyTorch's DDP or FSDP2, or DeepSpeed ZeRO.")
    ddp: DdpConfig = DdpConfig()
    fsdp: FsdpConfig = FsdpConfig()
    deepspeed: dict[str, Any] = Field({}, description="For `deepspeed`: a config in DeepSpeed's own JSON format.")
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Dtype in which the ranks send and sum their gradients. `bf16` halves the bytes, for slow "
        "networks. Each rank still accumulates its gradients in fp32. No effect with one rank.",
    )
    allow_different_numbers: bool = Field(
        False,
        description="Accept keys of `backend.deepspeed` that change the results, such as quantized communication. "
        "Logs, metrics, evaluation results, reports and model cards then name these keys.",
    )

    @property
    def zero(self) -> dict[str, Any]:
        """Return the section ``zero_optimization`` of DeepSpeed's config, or {} if there is none."""
        return dict(self.deepspeed.get("zero_optimization", {}))

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage, from 0 to 3."""
        return int(self.zero.get("stage", 0))

    @property
    def hpz_group_size(self) -> int:
        """Return the number of consecutive ranks that share secondary weight shards (ZeRO++ hpZ), or 1 without hpZ."""
        return int(self.zero.get(HPZ, 1)) or 1

    def reduces_in_bf16(self, world_size: int) -> bool:
        """Return whether the ranks send and sum their gradients in bf16."""
        return self.reduce_dtype == "bf16" and world_size > 1

    def ranks_per_copy(self, world_size: int) -> int:
        """Return the number of consecutive ranks that together hold one copy of the optimizer state.

        Under DDP and ZeRO-0, the result is 1.
        """
        if self.name == "ddp" or (self.name == "deepspeed" and self.zero_stage == 0):
            return 1
        if self.name == "fsdp" and self.fsdp.shard_group_size is not None:
            return self.fsdp.shard_group_size
        return world_size

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Return whether DeepSpeed offloads the optimizer state or the parameters to the host."""
        return bool(self.zero.get(f"offload_{what}", {}).get("device", "none") != "none")


class CheckpointConfig(Section):
    """How a run saves, deletes and loads checkpoints."""

    every_steps: PositiveInt = Field(1000, description="Steps between checkpoints. The last step is always saved.")
    keep_last: PositiveInt = Field(
        2, description="Number of newest checkpoints to keep. Older ones are deleted after a new one is verified."
    )
    keep_every_steps: PositiveInt | None = Field(
        None,
        description="Steps between milestones, which are additional checkpoints that are never deleted. `null`: no "
        "milestones.",
    )
    keep_best: bool = Field(
        False,
        description="Also save a checkpoint after each evaluation with a new lowest validation loss. The checkpoint "
        "with the lowest loss is kept. The validation before the first step does not count.",
    )
    resume: PathText = Field(
        "auto",
        description="`auto` resumes from the run's newest undamaged checkpoint, on the disk or at `remote`. `none` "
        "starts from scratch. A path or a URL names the checkpoint to resume from.",
    )
    init_from: PathText | None = Field(
        None,
        description="Start a new run from the weights at this path: a run folder, a checkpoint, a Hugging Face "
        "folder, or a nanoGPT file. Steps, optimizer state, schedule and data start from the beginning. This key has "
        "no effect when the run resumes from its own checkpoint.",
    )
    asynchronous: bool = Field(
        True, description="Copy the state to host memory, then write the copy while training continues."
    )
    remote: str | None = Field(
        None,
        description="Upload each checkpoint to this URL, such as `s3://bucket/run`, while training continues. Old "
        "checkpoints are deleted there as on the disk. `null`: no uploads.",
    )
    remote_timeout_s: PositiveFloat = Field(
        1800.0,
        description="Longest time in seconds for the upload of one checkpoint. A longer upload counts as failed. At "
        "the end of a run, the program waits at most this long for the last upload.",
    )

    @field_validator("resume")
    @classmethod
    def _check_word(cls, resume: str) -> str:
        word = resume.lower()
        if word in ("auto", "none") and resume != word:
            raise ValueError(f"{resume} is a path; did you mean {word}? (a folder of this name is ./{resume})")
        return resume

    @field_validator("remote")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.partition("://")[2].strip("/"):
            raise ValueError(
                f"{url} is not a URL; expected one such as s3://bucket/run, or file:///folder/run for a folder"
            )
        return url

    @model_validator(mode="after")
    def _check_one_start(self) -> CheckpointConfig:
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"resume ({self.resume}) and init_from ({self.init_from}) are both given; resume continues a run, "
                "init_from starts a new one from weights alone: set one of them"
            )
        return self


class GuardConfig(Section):
    """What a run does after bad steps. A step is always skipped if a gradient is NaN or infinite."""

    max_bad_steps: PositiveInt = Field(10, description="Stop the run after this many skipped steps in a row.")
    spike_zscore: PositiveFloat | None = Field(
        None,
        description="A step is a spike if its loss or gradient norm is more than this many standard deviations above "
        "the mean of the last `spike_window` steps. After a spike, the run goes back to the last checkpoint and skips "
        "the samples of the spike. `null` turns this off.",
    )
    spike_window: int = Field(100, ge=10, description="Number of previous steps with which a step is compared.")
    max_rollbacks: NonNegativeInt = Field(
        5, description="Largest number of spikes in a run. The next spike stops the run."
    )


class EvaluationConfig(Section):
    """The evaluation tasks that run during training."""

    every_steps: PositiveInt = Field(
        250, description="Steps between evaluations. A run also evaluates before the first and after the last step."
    )
    tasks: list[str] = Field(
        ["validation"],
        description=f"Tasks to run: {', '.join(f'`{name}`' for name in get_args(TaskName))}, or names from "
        "`evaluation.data`.",
    )
    data: dict[Annotated[str, Field(pattern=f"^{TASK_NAME.pattern}$")], PathText] = Field(
        {}, description="Maps task names to files. The default is the task's dataset on the Hugging Face hub."
    )
    max_batches: PositiveInt | None = Field(
        40,
        description="Largest number of validation batches, over all ranks. A batch has `batch.micro_batch_size` "
        "windows. The windows are spread evenly over the validation split. `null` uses the whole split.",
    )
    max_examples: PositiveInt | None = Field(
        500, description="Use only this many examples of each task, from the beginning. `null` uses all examples."
    )
    sample: bool = Field(
        False, description="Also generate text with the settings in section `sample`. TensorBoard shows it under TEXT."
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> EvaluationConfig:
        for task in self.tasks:
            if task not in get_args(TaskName) and task not in self.data:
                known = ", ".join(get_args(TaskName))
                raise ValueError(f"tasks: no such task {task!r}; there are {known}, or name its file in data")
        return self


class LoggingConfig(Section):
    """The metrics and profiles that a run writes during training."""

    every_steps: PositiveInt = Field(10, description="Optimizer steps between rows of metrics.")
    sinks: list[SinkName] = Field(
        ["jsonl", "tensorboard", "console"],
        description="Where to write the rows: `jsonl` (`metrics.jsonl`), `tensorboard`, `console`, `csv` "
        "(`metrics.csv`), `wandb`, `mlflow`. `jsonl` is always written, even if the list does not contain it.",
    )
    project: NonEmptyText = Field("gpt2-pipeline", description="Name of the W&B project and of the MLflow experiment.")
    wait_for_checkpoint: bool = Field(
        True,
        description="When to send rows to W&B and MLflow, which cannot delete rows. `true`: when the next checkpoint "
        "is saved. Each step then appears only once, even after a crash. `false`: at once. If a run with `false` goes "
        "back to a checkpoint, it starts a new W&B or MLflow run and sends all rows again.",
    )
    norms_every_steps: NonNegativeInt = Field(
        0,
        description="Steps between rows that show the gradient norm, the weight norm and the update ratio of each "
        "layer group. `0` turns this off.",
    )
    slow_rank_ratio: float | None = Field(
        1.2,
        gt=1,
        description="Name slow ranks in the log. A rank is slow if the time of its steps, divided by the mean time of "
        "the other ranks, is above this value in three consecutive rows. Time in which a rank waits for other ranks "
        "does not count. For runs on several hosts, this key also turns on a network check. If all ranks wait for more "
        "than half of the time, the log names the slowest link between the hosts. `null` turns off both checks, and "
        "the step times of the ranks are not measured.",
    )
    profile_steps: NonNegativeInt = Field(
        0,
        description="Profile this many optimizer steps, after the first five steps. The profile is in `profile/` in "
        "the run folder. Same as --profile.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_older_key(cls, section: Any) -> Any:
        """Accept ``tensorboard`` from older configs: false removes this sink from ``sinks``, true adds it."""
        if not isinstance(section, dict) or not isinstance(section.get("tensorboard"), bool):
            return section
        keys = {key: value for key, value in section.items() if key != "tensorboard"}
        sinks = keys.get("sinks", cls.model_fields["sinks"].default)
        if isinstance(sinks, list):
            others = [name for name in sinks if name != "tensorboard"]
            keys["sinks"] = [*others, "tensorboard"] if section["tensorboard"] else others
        return keys

    @field_validator("sinks")
    @classmethod
    def _add_jsonl(cls, sinks: list[SinkName]) -> list[SinkName]:
        return list(dict.fromkeys(["jsonl", *sinks]))


class SampleConfig(Section):
    """How evaluations and the commands ``run`` and ``generate`` generate text."""

    prompt: NonEmptyText = Field("The meaning of life is", description="Text that the model continues.")
    max_new_tokens: PositiveInt = Field(64, description="Largest number of tokens to generate.")
    temperature: NonNegativeFloat = Field(0.8, description="Sampling temperature. 0 takes the most likely token.")
    top_k: PositiveInt | None = Field(
        50, description="Sample from the k most likely tokens. `null` samples from all tokens."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the smallest set of most likely tokens whose probabilities sum to at least "
        "this number. `null` samples from all tokens.",
    )
    stop: list[NonEmptyText] = Field([], description="End the generated text before any of these texts.")


class Config(Section):
    """The config of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    tokenize: TokenizeConfig = TokenizeConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    averaging: AveragingConfig = AveragingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    backend: BackendConfig = BackendConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    sample: SampleConfig = SampleConfig()

    def with_run(self, **values: Any) -> Config:
        """Return a copy with other values in the section ``run``. The values are not validated."""
        return self.model_copy(update={"run": self.run.model_copy(update=values)})

    @property
    def seq_len(self) -> int:
        """Return the number of tokens per sample."""
        return self.data.seq_len or self.model.context_length

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        mistakes = []
        if self.seq_len > self.model.context_length:
            mistakes.append(
                f"data.seq_len ({self.seq_len}) must not exceed model.context_length ({self.model.context_length})"
            )
        if self.evaluation.sample and self.model.vocab_size != GPT2_VOCAB_SIZE:
            mistakes.append(
                f"evaluation.sample needs GPT-2's vocabulary: model.vocab_size is {self.model.vocab_size}, "
                f"not {GPT2_VOCAB_SIZE}; set evaluation.sample to false"
            )
        if "validation" not in self.evaluation.tasks:
            mistakes += [
                f"{key} needs the validation loss: add validation to evaluation.tasks, or leave {key} out"
                for key in self.keys_that_need_validation
            ]
        _refuse(mistakes)
        return self

    @property
    def keys_that_need_validation(self) -> list[str]:
        """Return the keys that this config sets and that need a validation loss, such as ``checkpoint.keep_best``."""
        is_given = {
            "schedule.stop_at_val_loss": self.schedule.stop_at_val_loss is not None,
            "schedule.stop_after_evaluations": self.schedule.stop_after_evaluations is not None,
            "checkpoint.keep_best": self.checkpoint.keep_best,
        }
        return [key for key, given in is_given.items() if given]
