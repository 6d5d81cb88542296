"""Check ``backend.deepspeed``, DeepSpeed's native JSON, without importing DeepSpeed."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pipeline.config.schema import BackendConfig

#: Maps DeepSpeed keys that the run config owns to the config keys that set them.
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

#: The other top-level keys that DeepSpeed 0.19 reads and that have an effect in this project, with their types.
#: DeepSpeed ignores unknown keys silently. The keys of DeepSpeed's loaders, checkpoints and model parallelism are not
#: in this table, because this project does not use these features.
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

_OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
_REPLACED = {"cpu_offload": "offload_optimizer", "cpu_offload_params": "offload_param"}
_TYPE_NAMES = {dict: "an object", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def find_mistakes(backend: BackendConfig) -> Iterator[tuple[str, str]]:
    """Yield the config key of each mistake, and one line that explains the mistake."""
    native = backend.deepspeed
    for key, mistake in (*_check_keys(native), *_check_zero(native.get("zero_optimization", {}))):
        yield f"backend.deepspeed.{key}", mistake
    if native and backend.name != "deepspeed":
        cure = 'set backend.name to "deepspeed" or drop backend.deepspeed'
        yield "backend.deepspeed", f"set, but backend.name is {backend.name}; {cure}"
    try:
        json.dumps(native, allow_nan=False)
    except ValueError:
        yield "backend.deepspeed", "every number must be finite, found NaN or Infinity"


def _check_keys(native: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in native.items():
        if key in OWNED_BY_RUN:
            yield key, f"the run config owns this; set {OWNED_BY_RUN[key]} instead"
        elif key not in PASSED_THROUGH:
            nearest = difflib.get_close_matches(key, [*PASSED_THROUGH, *OWNED_BY_RUN], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"those are {', '.join(PASSED_THROUGH)}"
            yield key, f"not among the keys that are passed on to DeepSpeed; {hint}"
        else:
            yield from _check_type(key, value, PASSED_THROUGH[key])


def _check_zero(zero: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(zero, dict):
        return  # _check_keys reports the wrong type
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield "zero_optimization.stage", f"must be 0, 1, 2 or 3, found {json.dumps(stage)}"
        return
    for key, replacement in _REPLACED.items():
        if key in zero:
            instead = f'{replacement}: {{"device": "cpu"}}'
            yield f"zero_optimization.{key}", f"DeepSpeed no longer supports this; set {instead} instead"
    for key, stages in _OFFLOAD_STAGES.items():
        if key in zero:
            yield from _check_type(f"zero_optimization.{key}", zero[key], dict)
            if stage not in stages:
                needed = " or ".join(map(str, stages))
                yield f"zero_optimization.{key}", f"needs zero_optimization.stage {needed}, which is {stage}"


def _check_type(key: str, value: Any, expected: type) -> Iterator[tuple[str, str]]:
    accepted = (int, float) if expected is float else (expected,)
    if type(value) not in accepted:
        yield key, f"must be {_TYPE_NAMES[expected]}, found {json.dumps(value)}"
