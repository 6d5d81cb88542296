"""The run config: one typed schema, whose defaults are the GPT-2 124M recipe.

Every number of a run has one owner here. ``pipeline.config.loading`` reads configs from JSON files
and ``--set`` overrides; nothing else builds one.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data_tools.tokenizer import GPT2_VOCAB_SIZE

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

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
TASK_NAME = re.compile(r"[\w.-]+")  # also the name of a file
Preset = Literal["gpt2-tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# n_layer, n_head, n_embd, context_length. The four of OpenAI: Radford et al. 2019, table 2.
MODEL_PRESETS: dict[Preset, dict[str, int]] = {
    "gpt2-tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context_length": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "context_length": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "context_length": 1024},
}


class Section(BaseModel):
    """A part of the config: immutable, unknown keys are refused, and "3" is not 3."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _one_is_not_true(given: Any) -> Any:
    """For a literal they are the same to pydantic, and so are 0 and false."""
    return str(given) if type(given) in (int, float) else given


class RunConfig(Section):
    """Identity of a run and how it computes."""

    name: str = Field("gpt2", description="shown in logs and TensorBoard")
    out_dir: str = Field("runs/gpt2", min_length=1, description="the run folder: metrics, checkpoints, results")
    seed: NonNegativeInt = Field(1337, description="initial weights, order of the data, dropout")
    device: Device = Field("auto", description="auto: cuda, else mps, else cpu")
    precision: Precision = Field(
        "amp_bf16",
        description="amp_*: fp32 weights under autocast; bf16: bf16 compute weights, fp32 master weights",
    )
    compile: Annotated[Literal["auto", True, False], BeforeValidator(_one_is_not_true)] = Field(
        "auto",
        description="torch.compile of model and loss together; auto: on CUDA, and on a CPU in runs of more than ten "
        "minutes, where a compiler works",
    )
    rank_timeout_s: PositiveInt = Field(60, description="seconds without a sign of life before a rank counts as lost")


class ModelConfig(Section):
    """The architecture: a preset, and what to change in it."""

    preset: Preset = Field("gpt2", description="where the sizes that are not given come from")
    n_layer: PositiveInt = Field(description="transformer blocks")
    n_head: PositiveInt = Field(description="attention heads; divides n_embd")
    n_embd: PositiveInt = Field(description="width of the residual stream")
    context_length: PositiveInt = Field(description="learned positions, in tokens")
    vocab_size: PositiveInt = Field(50257, description="of the tokenizer; padded to a multiple of 128 inside")
    dropout: Fraction = Field(0.0, description="on embeddings, attention and residual branches")
    reset_positions_at: NonNegativeInt | None = Field(
        None,
        description="the token that begins a text, 50256 of GPT-2: positions start at 0 again there, in training, "
        "evaluation and generation; attention still sees the texts before (null: positions of the window)",
    )
    activation_checkpointing: bool | PositiveInt = Field(
        False, description="recompute blocks in the backward pass: true, every block; n, the first of every n"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # pydantic says what is wrong
        default: Preset = cls.model_fields["preset"].default
        preset = given.get("preset", default)
        sizes = MODEL_PRESETS[preset] if isinstance(preset, str) and preset in MODEL_PRESETS else MODEL_PRESETS[default]
        return {**sizes, **given}

    def recomputes_block(self, index: int) -> bool:
        """Whether the backward pass computes this block (from 0) anew instead of keeping what it computed."""
        every = int(self.activation_checkpointing)
        return every > 0 and index % every == 0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        return self

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _switch_or_whole_number(cls, given: Any) -> Any:
        if not isinstance(given, int) or (given < 1 and given is not False):
            raise ValueError(f"must be true, false or a whole number from 1, found {json.dumps(given, default=str)}")
        return given

    @model_validator(mode="after")
    def _some_block_is_recomputed_in_turn(self) -> ModelConfig:
        if self.activation_checkpointing > self.n_layer:
            raise ValueError(
                f"activation_checkpointing ({self.activation_checkpointing}) must not exceed n_layer ({self.n_layer}); "
                "it recomputes the first of every so many blocks"
            )
        return self

    @model_validator(mode="after")
    def _reset_token_exists(self) -> ModelConfig:
        if self.reset_positions_at is not None and self.reset_positions_at >= self.vocab_size:
            raise ValueError(
                f"reset_positions_at ({self.reset_positions_at}) must be a token, less than "
                f"vocab_size ({self.vocab_size})"
            )
        return self


class TokenizeConfig(Section):
    """Stage 1 as ``launch/run.py`` starts it, with the options of ``launch/tokenize_corpus.py``.

    What is not given (null) is stage 1's own default.
    """

    source: Literal["text", "jsonl", "instructions", "parquet", "hf", "fineweb-edu", "python-stdlib"] = Field(
        "fineweb-edu", description="where documents come from"
    )
    input: list[str] = Field([], description="files, folders, or the name of a dataset")
    format: Literal["npy", "arrow"] | None = Field(None, description="of the shards")
    val_fraction: Fraction | None = Field(None, description="of the documents, held out for validation")
    shard_tokens: PositiveInt | None = Field(None, description="largest number of tokens in a shard")
    deduplicate: Literal["off", "exact"] | None = Field(None, description="leave out documents that came before")
    workers: PositiveInt | None = Field(None, description="encoding processes")
    limit_documents: PositiveInt | None = Field(None, description="stop after so many documents")
    limit_bytes: PositiveInt | None = Field(None, description="stop after so many bytes of UTF-8")


class MixturePart(Section):
    """One data set of a mixture."""

    path: str = Field(min_length=1, description="a folder with a manifest.json")
    weight: PositiveFloat = Field(description="its share of the samples, relative to the weights of the others")
    name: str = Field(pattern=r"^[\w.-]+$", description="in the metrics (default: the folder's)")

    @model_validator(mode="before")
    @classmethod
    def _name_after_folder(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("path"), str):
            return {"name": PurePath(given["path"]).name, **given}
        return given


class DataConfig(Section):
    """The tokens to train on."""

    path: str | None = Field("data/fineweb-edu", min_length=1, description="a folder with a manifest.json")
    mixture: list[MixturePart] | None = Field(
        None,
        min_length=1,
        description='in place of path, several data sets: a list of {"path": folder, "weight": number, "name": text}; '
        "samples are drawn in proportion to the weights, names (default: of the folders) stand in the metrics",
    )
    seq_len: PositiveInt | None = Field(None, description="tokens per sample (default: model.context_length)")
    verify: bool = Field(True, description="hash all shards before the start, shared among the ranks")

    @model_validator(mode="before")
    @classmethod
    def _mixture_replaces_the_default_path(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mixture") is not None and "path" not in given:
            return {**given, "path": None}
        return given

    @model_validator(mode="after")
    def _path_or_mixture(self) -> DataConfig:
        if self.path is not None and self.mixture is not None:
            raise ValueError(
                f"path ({self.path}) and mixture are both given; set one of data.path, data.mixture to null"
            )
        if self.path is None and self.mixture is None:
            raise ValueError("neither path nor mixture is given; set one of data.path, data.mixture")
        for key in ("path", "name"):
            values = [getattr(part, key) for part in self.mixture or ()]
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"mixture: the {key} {twice[0]} stands twice; every part needs its own")
        return self

    @property
    def parts(self) -> list[MixturePart]:
        """What to train on as the parts of a mixture; ``path`` alone is its only part."""
        if self.mixture is not None:
            return self.mixture
        assert self.path is not None
        return [MixturePart.model_construct(path=self.path, weight=1.0, name=PurePath(self.path).name)]


class BatchConfig(Section):
    """The batch, stated in tokens. Accumulation follows from the real world size."""

    tokens_per_step: PositiveInt = Field(524_288, description="target tokens per optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(16, description="sequences per rank and micro-step")


class OptimizerConfig(Section):
    """AdamW, decoupled weight decay on tensors of two dimensions or more."""

    learning_rate: PositiveFloat = Field(6e-4, description="the peak, after warm-up")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="decay of the two moments")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled; biases and LayerNorm are spared")
    grad_clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0: no clipping")


class ScheduleConfig(Section):
    """Linear warm-up, then cosine. The defaults are 10B tokens at the default batch."""

    warmup_steps: NonNegativeInt = Field(715, description="optimizer steps of linear warm-up")
    max_steps: PositiveInt = Field(19_073, description="optimizer steps of the whole run")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="last learning rate / peak")

    @model_validator(mode="after")
    def _warmup_fits(self) -> ScheduleConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed max_steps ({self.max_steps})")
        return self


class DdpConfig(Section):
    """DistributedDataParallel: weights replicated, gradients all-reduced."""

    bucket_cap_mb: PositiveInt = Field(25, description="size of a gradient bucket in MiB")


class FsdpConfig(Section):
    """FSDP2 (``fully_shard``): each block's weights, gradients and moments sharded over the ranks."""

    reshard_after_forward: bool = Field(True, description="free a block's gathered weights after its forward")


class BackendConfig(Section):
    """Which library distributes the training. It does not change the numbers."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field("ddp", description="the library")
    ddp: DdpConfig = Field(default_factory=DdpConfig)
    fsdp: FsdpConfig = Field(default_factory=FsdpConfig)
    deepspeed: dict[str, Any] = Field({}, description="native DeepSpeed JSON, passed through")


class CheckpointConfig(Section):
    """When to save, what to keep, where to start."""

    every_steps: PositiveInt = Field(1000, description="optimizer steps between checkpoints; the last step always")
    keep_last: PositiveInt = Field(2, description="older checkpoints are deleted once a newer one verifies")
    resume: str = Field("auto", min_length=1, description="auto: the newest good one of the run; none; or a path")
    asynchronous: bool = Field(True, description="write while training goes on, from a copy in host memory")


class GuardConfig(Section):
    """What to do about steps that go wrong. A step whose loss or gradient is not finite is always skipped."""

    max_bad_steps: PositiveInt = Field(10, description="steps in a row that are not finite before the run stops")
    spike_zscore: PositiveFloat | None = Field(
        None,
        description="standard deviations of loss or gradient norm above the last steps that count as a spike: the run "
        "goes back to the last checkpoint and leaves the batch out (null: no such guard)",
    )
    spike_window: Annotated[int, Field(ge=10)] = Field(100, description="steps that a spike is measured against")
    max_rollbacks: NonNegativeInt = Field(5, description="spikes in a run before it stops")


class EvaluationConfig(Section):
    """Validation and tasks while training."""

    every_steps: PositiveInt = Field(250, description="optimizer steps between evaluations; first and last always")
    tasks: list[str] = Field(
        ["validation"],
        description=f"what to measure: {', '.join(f'`{name}`' for name in get_args(TaskName))}, or a name in "
        "evaluation.data",
    )
    data: dict[Annotated[str, Field(pattern=f"^{TASK_NAME.pattern}$")], str] = Field(
        {}, description="task: its file (default: the dataset of the Hugging Face hub)"
    )
    max_batches: PositiveInt | None = Field(
        40,
        description="of validation: micro-batches over all ranks, spread evenly over the split (null: the whole split)",
    )
    max_examples: PositiveInt | None = Field(500, description="of each task: its first examples (null: all)")
    sample: bool = Field(False, description="also write the text of `sample`, for TensorBoard's page TEXT")

    @model_validator(mode="after")
    def _tasks_are_known(self) -> EvaluationConfig:
        for task in self.tasks:
            if task not in get_args(TaskName) and task not in self.data:
                known = ", ".join(get_args(TaskName))
                raise ValueError(f"tasks: no such task {task!r}; there are {known}, or name its file in data")
        return self


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: PositiveInt = Field(10, description="optimizer steps between logged rows")
    tensorboard: bool = Field(True, description="event files in the run folder")
    profile_steps: NonNegativeInt = Field(
        0, description="optimizer steps to trace, after the first five, into profile/ of the run folder; also --profile"
    )


class SampleConfig(Section):
    """The text that the model writes at evaluations (``evaluation.sample``) and after ``launch/run.py``.

    Also the defaults of ``launch/generate.py``.
    """

    prompt: str = Field("The meaning of life is", min_length=1, description="what the model continues")
    max_new_tokens: PositiveInt = Field(64, description="tokens to write")
    temperature: NonNegativeFloat = Field(0.8, description="0: the likeliest token each time")
    top_k: PositiveInt | None = Field(50, description="draw from the k likeliest (null: from all)")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="draw from the likeliest that together reach this probability (null: from all)"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], description="the text ends before the first of these")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    backend: BackendConfig = Field(default_factory=BackendConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)

    @property
    def seq_len(self) -> int:
        """Tokens per sample."""
        return self.data.seq_len or self.model.context_length

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Config:
        if self.seq_len > self.model.context_length:
            raise ValueError(
                f"data.seq_len ({self.seq_len}) must not exceed model.context_length ({self.model.context_length})"
            )
        if self.evaluation.sample and self.model.vocab_size != GPT2_VOCAB_SIZE:
            raise ValueError(
                f"evaluation.sample needs GPT-2's vocabulary: model.vocab_size is {self.model.vocab_size}, "
                f"not {GPT2_VOCAB_SIZE}"
            )
        return self
