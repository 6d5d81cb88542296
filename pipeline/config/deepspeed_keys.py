"""What may stand in ``backend.deepspeed``, DeepSpeed's native JSON.

Imports no DeepSpeed: a mistake is found before anything starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

#: Keys that are the run config's business, and where it states them.
OWNED_BY_RUN = {
    "train_batch_size": "batch.tokens_per_step",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.tokens_per_step",
    "managed_gradient_accumulation": "batch.tokens_per_step",
    "elasticity": "batch.tokens_per_step",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "run.precision",
    "bf16": "run.precision",
    "amp": "run.precision",
    "torch_autocast": "run.precision",
    "data_types": "run.precision",
    "communication_data_type": "run.precision",
    "zero_force_ds_cpu_optimizer": "backend.deepspeed.zero_optimization.offload_optimizer",
    "tensorboard": "logging.tensorboard",
}

#: The other top-level keys that DeepSpeed 0.19 reads and that can take effect here, with their types.
#: DeepSpeed ignores a mistyped key without a word; its own loaders, checkpoints and model parallelism are not used.
PASSED_THROUGH: dict[str, type] = {
    "zero_optimization": dict,
    "zero_allow_untested_optimizer": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "log_level": str,
    "aio": dict,
    "comet": dict,
    "comms_logger": dict,
    "compile": dict,
    "csv_monitor": dict,
    "flops_profiler": dict,
    "timers": dict,
    "wandb": dict,
}

_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}  # and the stages that can
_DEPRECATED = {"cpu_offload": "offload_optimizer", "cpu_offload_params": "offload_param"}
_TYPE_NAMES = {dict: "an object", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def find_mistakes(native: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key inside ``backend.deepspeed``, and what is wrong with it in one line."""
    for key, value in native.items():
        if key in OWNED_BY_RUN:
            yield key, f"the run config owns this; set {OWNED_BY_RUN[key]} instead"
        elif key not in PASSED_THROUGH:
            nearest = difflib.get_close_matches(key, [*PASSED_THROUGH, *OWNED_BY_RUN], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"those are {', '.join(PASSED_THROUGH)}"
            yield key, f"not among the keys that are passed on to DeepSpeed; {hint}"
        else:
            yield from _wrong_type(key, value, PASSED_THROUGH[key])
    if isinstance(zero := native.get("zero_optimization", {}), dict):
        yield from _mistakes_of_zero(zero)


def _mistakes_of_zero(zero: dict[str, Any]) -> Iterator[tuple[str, str]]:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield "zero_optimization.stage", f"must be 0, 1, 2 or 3, found {json.dumps(stage)}"
        return
    for key, successor in _DEPRECATED.items():
        if key in zero:
            yield (
                f"zero_optimization.{key}",
                f'DeepSpeed has given this up; set {successor}: {{"device": "cpu"}} instead',
            )
    for key, stages in _OFFLOADS.items():
        if key not in zero:
            continue
        yield from _wrong_type(f"zero_optimization.{key}", zero[key], dict)
        if stage not in stages:
            named = " or ".join(map(str, stages))
            yield f"zero_optimization.{key}", f"needs zero_optimization.stage {named}, which is {stage}"


def _wrong_type(key: str, value: Any, expected: type) -> Iterator[tuple[str, str]]:
    accepted = (int, float) if expected is float else (expected,)
    if type(value) not in accepted:
        yield key, f"must be {_TYPE_NAMES[expected]}, found {json.dumps(value)}"
