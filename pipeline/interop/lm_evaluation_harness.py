"""Let lm-evaluation-harness score the checkpoints of this project, under the model name ``gpt2-pipeline``.

Importing this module registers the model. The module needs the extra ``harness``.
"""

import itertools
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from data_tools.errors import PROJECT, DataError
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.checkpoint.loading import load_text_model
from pipeline.config.schema import Device, Precision, SampleConfig
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.environment import launched_world_size, set_allocator_default
from pipeline.distributed.world import World, choose_device
from pipeline.errors import ConfigError
from pipeline.evaluation.packing import Request
from pipeline.evaluation.protocols import encode_pair
from pipeline.evaluation.scoring import Scorer, compute_for_scoring
from pipeline.evaluation.texts import rolling_windows
from pipeline.generation.text_generator import TextGenerator, load_text_generator
from pipeline.hardware.matmul_ceiling import describe_slow_precision
from pipeline.model.parameter_state import KINDS_OF_WEIGHTS

log = logging.getLogger(__name__)

HARNESS_MODEL = PROJECT  # the name for ``lm_eval --model``

_MOST_NEW_TOKENS = 256  # the default of the harness for tasks that do not set a number


@register_model(HARNESS_MODEL)
class CheckpointModel(LM):  # type: ignore[misc]
    """Lets lm-evaluation-harness evaluate a checkpoint, in one process and with the prompts of ``launch/evaluate.py``.

    Args:
        checkpoint: a checkpoint folder or a run folder. From a run folder, the newest good checkpoint is used.
        weights: ``training``, or ``ema`` for the moving average of the weights.
        precision: None means the precision of the run.
        batch_size: the number of prompts (for generation) or full-length sequences (for scoring) per batch. ``auto``
            means the run's micro-batch size.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        max_batch_size: not used. The harness always passes this argument.

    Raises:
        ConfigError: an argument is not valid, or a launcher has started several processes.
        CheckpointError: the checkpoint cannot be used, or the vocabulary is not GPT-2's.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        weights: str = "training",
        precision: str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("weights", weights, tuple(KINDS_OF_WEIGHTS))
        _check_choice("precision", precision, (None, *get_args(Precision)))
        self.world = _join_alone(device or "auto")
        self._device = self.world.device
        loaded = load_text_model(checkpoint, self.world.device, weights)
        self.checkpoint, self.step, self.config, self.weights = loaded.checkpoint, loaded.step, loaded.config, weights
        self.precision = precision or loaded.config.run.precision
        self.rows = self.config.batch.micro_batch_size if batch_size == "auto" else _positive("batch_size", batch_size)
        self._tokenizer = load_tokenizer()
        if warning := describe_slow_precision(self.precision, self.world.device, "precision="):
            log.warning(warning)
        compute = compute_for_scoring(loaded.model, self.precision, self.world.device)
        self.scorer = Scorer(compute, self.config.model, self.world, self.rows * self.config.seq_len)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding generates this continuation.

        The arguments of each request are a context and a continuation.

        Raises:
            DataError: a continuation has no token, or more tokens than the model's context length.
        """
        encoded = [self._encode(*request.args) for request in requests]
        # The choices of an example follow each other, so requests with the same context are neighbours.
        groups = [list(group) for _, group in itertools.groupby(encoded, key=lambda request: request.context)]
        scores = self.scorer.score(groups, "loglikelihood")
        return [(score.log_likelihood, score.is_greedy) for group in scores for score in group]

    def _encode(self, context: str, continuation: str) -> Request:
        if not context.strip():  # the harness has no rule for a context of white space only
            context, continuation = "", context + continuation
        request = encode_pair(self._tokenizer, context, continuation)
        longest = self.config.model.context_length
        if len(request.continuation) > longest:
            raise DataError(
                f"a continuation has {len(request.continuation)} tokens, more than the model's context of {longest}: "
                f"{continuation[:60]!r}...; leave this task out"
            )
        return request

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each text. Long texts are scored in windows that do not overlap.

        Each request has the text as its first argument.
        """
        length = self.config.model.context_length
        texts = [self._tokenizer.encode(request.args[0]).tolist() for request in requests]
        windows = [list(rolling_windows(tokens, END_OF_TEXT, length, length)) for tokens in texts]
        scores = iter(self.scorer.score([[window] for of_text in windows for window in of_text], "rolling"))
        return [sum(score.log_likelihood for _ in of_text for score in next(scores)) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a completion of each prompt. A completion ends before ``<|endoftext|>`` or the first stop text.

        If prompt and completion do not fit into the model's context, the beginning of the prompt is removed.

        The arguments of each request are a prompt and the options ``until``, ``max_gen_toks``, ``do_sample``,
        ``temperature``, ``top_k`` and ``top_p``. Other options are not used.
        """
        by_options: dict[str, tuple[SampleConfig, list[int]]] = {}
        for number, request in enumerate(requests):
            sample = _sample_options(request.args[1])
            by_options.setdefault(sample.model_dump_json(), (sample, []))[1].append(number)
        completions = [""] * len(requests)
        for sample, numbers in by_options.values():
            prompts = {number: self._encode_prompt(requests[number].args[0], sample) for number in numbers}
            for batch in _batches(sorted(numbers, key=lambda number: -len(prompts[number])), self.rows):
                texts = self._generator.complete_tokens([prompts[number] for number in batch], sample, seed=0)
                for number, text in zip(batch, texts, strict=True):
                    completions[number] = text
        return completions

    def _encode_prompt(self, prompt: str, sample: SampleConfig) -> list[int]:
        room = max(self.config.model.context_length - sample.max_new_tokens, 1)
        return self._tokenizer.encode(prompt).tolist()[-room:] or [END_OF_TEXT]

    @cached_property
    def _generator(self) -> TextGenerator:
        """Return a second copy of the model, because scoring and generation may need different dtypes."""
        dtype = "fp32" if self.precision == "fp32" else "bf16"
        return load_text_generator(self.checkpoint, self.world.device, dtype, self.weights, prompts=self.rows)

    @property
    def tokenizer_name(self) -> str:
        """Return the name of the tokenizer. The harness caches a task's requests separately per tokenizer name."""
        return "gpt2"

    def get_model_info(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "weights": self.weights,
            "precision": self.precision,
        }

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return "", because the model has no chat template. Raises ConfigError if the user asked for one."""
        if chat_template:
            raise ConfigError("--apply_chat_template: a checkpoint has no chat template; leave it out")
        return ""


def _join_alone(device: str) -> World:
    """Return the world of a single process.

    This function sets no launcher variables. If they were set, ``transformers`` would expect several processes.
    """
    _check_choice("device", device, get_args(Device))
    if launched_world_size() > 1:
        raise ConfigError("the model of lm-evaluation-harness runs in one process; start it without torchrun")
    world = World.alone(choose_device(device, option="device"))
    if world.device.type == "cuda":
        set_allocator_default()
    configure_cpu(world)
    return world


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConfigError(f"--model_args: {name} is {value!r}; it must be one of {names}")


def _positive(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"--{name}: must be a whole number from 1 or auto, it is {value!r}")
    return int(value)


def _sample_options(options: dict[str, Any]) -> SampleConfig:
    """Convert the options of a request to ours. Without ``do_sample`` or a temperature, decoding is greedy."""
    given = normalize_gen_kwargs(options, _MOST_NEW_TOKENS)
    return SampleConfig(
        max_new_tokens=given["max_gen_toks"],
        temperature=given.get("temperature", 1.0) if given["do_sample"] else 0.0,
        top_k=given.get("top_k") or None,
        top_p=given.get("top_p"),
        stop=[text for text in given["until"] if text],
    )


def _batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
