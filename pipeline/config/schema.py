"""The schema of a run config. Its defaults are the GPT-2 124M recipe.

Every setting of a run has its default and its meaning here, and nowhere else. ``pipeline.config.loading`` builds a
:class:`Config` from JSON files and ``--set`` overrides; ``pipeline.config.reference`` turns the schema into
``docs/config.md``.
"""

from __future__ import annotations

import json
import math
import re
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
from data_tools.tokenizer import GPT2_VOCAB_SIZE

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmptyText = Annotated[str, Field(min_length=1)]


def _require_path(text: str) -> str:
    """Return the text, or raise ValueError if no file can have this name."""
    if "\0" in text:
        raise ValueError("no file can have this name, because it holds a NUL character")
    return text


PathText = Annotated[NonEmptyText, AfterValidator(_require_path)]

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
]
TASK_NAME = re.compile(r"[\w.-]+")  # a task's name is also the name of its result file
Preset = Literal["gpt2-tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# OpenAI's four sizes are those of Radford et al. 2019, table 2.
MODEL_PRESETS: dict[Preset, dict[str, int]] = {
    "gpt2-tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context_length": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "context_length": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "context_length": 1024},
}


class Section(BaseModel):
    """A section of the config. Sections are immutable, refuse unknown keys, and do not convert "3" to 3."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _number_as_text(given: Any) -> Any:
    """Convert a number to text, because pydantic takes 1 for the literal True and 0 for the literal False."""
    return str(given) if type(given) in (int, float) else given


class RunConfig(Section):
    """The name of the run, its output folder, and how the run computes."""

    name: str = Field("gpt2", description="Name of the run in logs and TensorBoard.")
    out_dir: PathText = Field("runs/gpt2", description="Run folder for metrics, checkpoints and results.")
    seed: NonNegativeInt = Field(1337, description="Seed of the initial weights, the data order and dropout.")
    device: Device = Field("auto", description="`auto` chooses cuda if available, else mps, else cpu.")
    precision: Precision = Field(
        "amp_bf16",
        description="`amp_*` keeps fp32 weights and computes under autocast. `bf16` computes with bf16 weights and "
        "updates fp32 master weights.",
    )
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_number_as_text)] = Field(
        "auto",
        description="Compile model and loss with torch.compile. `auto` compiles if a compiler works, on CUDA always "
        "and on a CPU if the run takes more than ten minutes at the measured time of a step.",
    )
    working_dir: NonEmptyText | None = Field(
        None,
        description="Folder in which the run was started (set by the program). Data that is missing at a relative path "
        "is looked for there.",
    )
    rank_timeout_s: PositiveInt = Field(
        60, description="Seconds without a heartbeat, or without progress, after which the run ends and names the rank."
    )

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled. ``auto`` counts as False until ``choose_compilation`` replaces it."""
        return self.compile is True


class ModelConfig(Section):
    """The architecture: a preset, and the sizes that differ from the preset."""

    preset: Preset = Field("gpt2", description="The preset for all sizes that the config does not set.")
    n_layer: PositiveInt = Field(description="Number of transformer blocks.")
    n_head: PositiveInt = Field(description="Number of attention heads. It must divide n_embd.")
    n_embd: PositiveInt = Field(description="Width of the residual stream.")
    context_length: PositiveInt = Field(description="Number of learned positions, in tokens.")
    vocab_size: PositiveInt = Field(
        GPT2_VOCAB_SIZE, description="Vocabulary size of the tokenizer. The model pads it to a multiple of 128."
    )
    dropout: Fraction = Field(0.0, description="Dropout of embeddings, attention weights and residual branches.")
    reset_positions_at: NonNegativeInt | None = Field(
        None,
        description="Token at which positions restart from 0 (GPT-2's end of text is 50256), in training, evaluation "
        "and generation. Attention still includes earlier tokens. With `null`, positions never restart in a window.",
    )
    activation_checkpointing: bool | PositiveInt = Field(
        False,
        description="Recompute blocks in the backward pass instead of keeping their activations: `true` for every "
        "block, n for the first of every n blocks.",
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
                f"reset_positions_at ({self.reset_positions_at}) must be a token, less than "
                f"vocab_size ({self.vocab_size})"
            )
        _refuse(mistakes)
        return self

    def recomputes_block(self, index: int) -> bool:
        """Return whether the backward pass recomputes the block with this index instead of keeping its activations."""
        every = int(self.activation_checkpointing)
        return every > 0 and index % every == 0


class TokenizeConfig(Section):
    """The options with which ``launch/run.py`` starts ``launch/tokenize_corpus.py``.

    null means the default of ``launch/tokenize_corpus.py``.
    """

    source: SourceKind = Field("fineweb-edu", description="Kind of source of the documents.")
    input: list[PathText] = Field([], description="Files, folders, or the name of a dataset.")
    format: ShardFormat | None = Field(None, description="File format of the shards.")
    val_fraction: Fraction | None = Field(None, description="Fraction of the documents held out for validation.")
    shard_tokens: PositiveInt | None = Field(None, description="Largest number of tokens in a shard.")
    deduplicate: Deduplication | None = Field(
        None, description="`exact` leaves out every document that is equal to an earlier document."
    )
    on_bad_rows: BadRows | None = Field(
        None, description="`skip` leaves out and reports rows that cannot be read, `stop` ends with the first one."
    )
    workers: PositiveInt | None = Field(None, description="Number of encoding processes.")
    limit_documents: PositiveInt | None = Field(None, description="Largest number of documents to tokenize.")
    limit_bytes: PositiveInt | None = Field(
        None, description="Stop after the document that reaches this total of bytes in UTF-8."
    )


class MixtureComponent(Section):
    """One dataset of a mixture."""

    path: PathText = Field(description="A folder with a manifest.json.")
    weight: PositiveFloat = Field(description="The dataset's share of the samples, relative to the other weights.")
    name: str = Field(pattern=r"^[\w.-]+$", description="Name in the metrics (default: the folder's name).")

    @model_validator(mode="before")
    @classmethod
    def _name_after_folder(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("path"), str):
            return {"name": PurePath(given["path"]).name, **given}
        return given


class DataConfig(Section):
    """The tokens to train on."""

    path: PathText | None = Field("data/fineweb-edu", description="A folder with a manifest.json.")
    mixture: list[MixtureComponent] | None = Field(
        None,
        min_length=1,
        description='Several datasets instead of `path`: a list of {"path": folder, "weight": number, "name": text}. '
        "Samples are drawn in proportion to the weights. Metrics show the names (default: the folders' names).",
    )
    seq_len: PositiveInt | None = Field(None, description="Tokens per sample (default: model.context_length).")
    verify: bool = Field(
        True, description="Check the hash of every shard before training. Each rank checks a share of the shards."
    )

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
        """The datasets of the mixture, or the dataset at ``path`` alone."""
        if self.mixture is not None:
            return self.mixture
        assert self.path is not None
        return [MixtureComponent.model_construct(path=self.path, weight=1.0, name=PurePath(self.path).name)]


class BatchConfig(Section):
    """The batch size in tokens. The number of micro-steps follows from the batch size and the world size."""

    tokens_per_step: PositiveInt = Field(524_288, description="Target tokens per optimizer step over all ranks.")
    micro_batch_size: PositiveInt = Field(16, description="Sequences per rank and micro-step.")


class MuonConfig(Section):
    """The settings of Muon for the matrices of the blocks. AdamW updates embeddings, biases and LayerNorm weights."""

    momentum: Fraction = Field(0.95, description="Decay rate of the mean of the gradients.")
    nesterov: bool = Field(True, description="Add the newest gradient to the momentum once more (Nesterov momentum).")
    iterations: PositiveInt = Field(5, le=20, description="Newton-Schulz iterations that orthogonalize a matrix.")
    split_qkv: bool = Field(
        True, description="Orthogonalize the projections to queries, keys and values as three matrices instead of one."
    )


class OptimizerConfig(Section):
    """AdamW, or Muon with AdamW. Weight decay applies to tensors with two or more dimensions."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="`adamw` for all parameters, or `muon` for the matrices of the blocks and AdamW for the rest. The "
        "learning rate and the weight decay of AdamW also suit Muon.",
    )
    learning_rate: PositiveFloat = Field(6e-4, description="Peak learning rate, reached after warm-up.")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), strict=False, description="Decay rates of AdamW's two moments."
    )
    eps: PositiveFloat = Field(1e-8, description="Term that AdamW adds to the square root of the second moment.")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="Decoupled weight decay. It does not apply to biases and LayerNorm weights."
    )
    grad_clip: NonNegativeFloat = Field(1.0, description="Largest global gradient norm. 0 turns clipping off.")
    muon: MuonConfig = MuonConfig()


class ScheduleConfig(Section):
    """The learning rate over the steps of a run. The defaults train on 10B tokens at the default batch."""

    name: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine",
        description="The curve after the warm-up. `cosine` and `linear` decay over all remaining steps. `wsd` "
        "(warm-up, stable, decay) keeps the peak and decays over the last `decay_steps`. `constant` keeps the peak.",
    )
    warmup_steps: NonNegativeInt = Field(715, description="Optimizer steps of linear warm-up.")
    max_steps: PositiveInt = Field(19_073, description="Optimizer steps of the whole run.")
    decay_steps: PositiveInt | None = Field(
        None,
        description="For `wsd`: number of steps of the decay, which ends at `max_steps`. `null`: a fifth of the run.",
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = Field(
        None, description="For `wsd`: the curve of the decay. `null`: `linear`."
    )
    min_lr_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Learning rate after `max_steps` steps, divided by the peak. `constant` does not use it.",
    )

    stop_at_val_loss: PositiveFloat | None = Field(
        None, description="End the run after an evaluation with at most this validation loss. `null`: do not."
    )
    stop_after_evaluations: PositiveInt | None = Field(
        None,
        description="End the run after this many evaluations in a row without a new lowest validation loss. `null`: do "
        "not.",
    )

    @model_validator(mode="after")
    def _check_steps(self) -> ScheduleConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed max_steps ({self.max_steps})")
        given = [key for key in ("decay_steps", "decay_shape") if getattr(self, key) is not None]
        if given and self.name != "wsd":
            raise ValueError(
                f'{" and ".join(given)}: only name "wsd" has a separate decay, and name is "{self.name}"; '
                'set name to "wsd", or leave out what it does not use'
            )
        if self.decay_start < self.warmup_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.max_steps - self.decay_start}) must not "
                f"exceed max_steps ({self.max_steps}) together"
            )
        return self

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to fall, or ``max_steps`` if it never falls."""
        if self.name == "constant":
            return self.max_steps
        if self.name == "wsd":
            return self.max_steps - (self.decay_steps or math.ceil(self.max_steps / 5))
        return self.warmup_steps

    def __str__(self) -> str:
        """Return the schedule in words."""
        if self.name == "constant":
            return f"warm-up {self.warmup_steps:,} steps, then constant to step {self.max_steps:,}"
        decay = f"{self.name} to {self.min_lr_ratio:g} of the peak at step {self.max_steps:,}"
        if self.name == "wsd":
            decay = f"constant to step {self.decay_start:,}, {self.decay_shape or 'linear'}" + decay.removeprefix("wsd")
        return f"warm-up {self.warmup_steps:,} steps, {decay}"


class DdpConfig(Section):
    """DistributedDataParallel: every rank has all weights, and gradients are all-reduced."""

    bucket_cap_mb: PositiveInt = Field(25, description="Size of a gradient bucket in MiB.")


class FsdpConfig(Section):
    """FSDP2 (``fully_shard``): the weights, gradients and moments of each block are sharded over the ranks."""

    reshard_after_forward: bool = Field(
        True,
        description="Free a block's gathered weights after its forward pass. With `false`, a step gathers each weight "
        "once.",
    )


class BackendConfig(Section):
    """The library that distributes the training. The choice of the library does not change the results."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field("ddp", description="The library.")
    ddp: DdpConfig = DdpConfig()
    fsdp: FsdpConfig = FsdpConfig()
    deepspeed: dict[str, Any] = Field({}, description="Native DeepSpeed JSON, passed on to DeepSpeed.")
    allow_different_numbers: bool = Field(
        False,
        description="Accept keys of `backend.deepspeed` that change the results, such as quantized communication. The "
        "log, every row of metrics, evaluation results, reports and model cards then name these keys.",
    )

    @property
    def zero(self) -> dict[str, Any]:
        """The section ``zero_optimization`` of DeepSpeed's JSON."""
        return dict(self.deepspeed.get("zero_optimization", {}))

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return int(self.zero.get("stage", 0))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole optimizer state, as under DDP and ZeRO-0."""
        return self.name == "ddp" or (self.name == "deepspeed" and self.zero_stage == 0)

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Return whether DeepSpeed keeps the optimizer's state or the parameters outside the device."""
        return bool(self.zero.get(f"offload_{what}", {}).get("device", "none") != "none")


class CheckpointConfig(Section):
    """The settings for saving, keeping and resuming from checkpoints."""

    every_steps: PositiveInt = Field(1000, description="Steps between checkpoints. The last step is always saved.")
    keep_last: PositiveInt = Field(
        2, description="Number of checkpoints to keep. An older checkpoint is deleted after a new one is verified."
    )
    keep_every_steps: PositiveInt | None = Field(
        None,
        description="Also save a checkpoint after every multiple of this number of steps, and never delete it. Another "
        "run can branch off from such a milestone. `null`: no milestones.",
    )
    keep_best: bool = Field(
        False,
        description="Also save a checkpoint after each evaluation with a new lowest validation loss, and keep the "
        "checkpoint with the lowest one.",
    )
    resume: PathText = Field(
        "auto",
        description="`auto` resumes from the run's newest good checkpoint, `none` starts from scratch, and a path "
        "resumes from this checkpoint.",
    )
    init_from: PathText | None = Field(
        None,
        description="Weights to start a new run from: a run folder, a checkpoint, a Hugging Face folder, or a file of "
        "nanoGPT. The step, the moments, the schedule and the data start from the beginning. Not read once the run has "
        "checkpoints of its own.",
    )
    asynchronous: bool = Field(
        True, description="Copy the state to host memory and write the copy while training continues."
    )

    @model_validator(mode="after")
    def _check_one_start(self) -> CheckpointConfig:
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                f"resume ({self.resume}) and init_from ({self.init_from}) are both given; resume continues a run, "
                "init_from starts a new one from weights alone: set one of them"
            )
        return self


class GuardConfig(Section):
    """The reaction to bad steps. A step whose loss or gradient is not finite is always skipped."""

    max_bad_steps: PositiveInt = Field(10, description="Number of skipped steps in a row after which the run stops.")
    spike_zscore: PositiveFloat | None = Field(
        None,
        description="A step is a spike if its loss or gradient norm is more than this number of standard deviations "
        "above the mean of the last steps. After a spike, the run continues from the last checkpoint and leaves the "
        "batch out. `null` turns this off.",
    )
    spike_window: int = Field(100, ge=10, description="Number of previous steps that a step is compared with.")
    max_rollbacks: NonNegativeInt = Field(5, description="Number of spikes after which the next spike stops the run.")


class EvaluationConfig(Section):
    """The validation and the evaluation tasks during training."""

    every_steps: PositiveInt = Field(
        250, description="Steps between evaluations. A run also evaluates before the first and after the last step."
    )
    tasks: list[str] = Field(
        ["validation"],
        description=f"Tasks to run: {', '.join(f'`{name}`' for name in get_args(TaskName))}, or a name in "
        "evaluation.data.",
    )
    data: dict[Annotated[str, Field(pattern=f"^{TASK_NAME.pattern}$")], PathText] = Field(
        {}, description="Maps a task to its file (default: the task's dataset on the Hugging Face hub)."
    )
    max_batches: PositiveInt | None = Field(
        40,
        description="Validation batches over all ranks, spread evenly over the split. `null` uses the whole split.",
    )
    max_examples: PositiveInt | None = Field(
        500, description="Largest number of examples per task, from the beginning. `null` uses all examples."
    )
    sample: bool = Field(
        False, description="Also generate a completion with the settings of `sample`. TensorBoard shows it under TEXT."
    )

    @model_validator(mode="after")
    def _check_tasks(self) -> EvaluationConfig:
        for task in self.tasks:
            if task not in get_args(TaskName) and task not in self.data:
                known = ", ".join(get_args(TaskName))
                raise ValueError(f"tasks: no such task {task!r}; there are {known}, or name its file in data")
        return self


class LoggingConfig(Section):
    """The rows, events and profiles that a run writes during training."""

    every_steps: PositiveInt = Field(10, description="Optimizer steps between logged rows.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files into the run folder.")
    profile_steps: NonNegativeInt = Field(
        0,
        description="Number of optimizer steps to profile after the first five steps. The profile is written to "
        "`profile/` in the run folder. Same as --profile.",
    )


class SampleConfig(Section):
    """The settings for completions in evaluations (``evaluation.sample``) and at the end of ``launch/run.py``.

    These settings are also the defaults of ``launch/generate.py``.
    """

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
        description="Sample from the fewest most likely tokens whose probabilities sum to at least this number. `null` "
        "samples from all tokens.",
    )
    stop: list[NonEmptyText] = Field([], description="The completion ends before the first of these texts.")


class Config(Section):
    """The config of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig.model_validate({})
    tokenize: TokenizeConfig = TokenizeConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    backend: BackendConfig = BackendConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def seq_len(self) -> int:
        """The number of tokens per sample."""
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
        """The keys that are set and have an effect only if the run measures the validation loss."""
        is_given = {
            "schedule.stop_at_val_loss": self.schedule.stop_at_val_loss is not None,
            "schedule.stop_after_evaluations": self.schedule.stop_after_evaluations is not None,
            "checkpoint.keep_best": self.checkpoint.keep_best,
        }
        return [key for key, given in is_given.items() if given]
