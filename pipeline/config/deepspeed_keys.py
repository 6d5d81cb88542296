"""Check DeepSpeed's own JSON config in ``backend.deepspeed``, without importing DeepSpeed."""

import json
from collections.abc import Iterator
from typing import Any

from pipeline.config.nearest import nearest_name
from pipeline.config.schema import HPZ, BackendConfig, Config

#: DeepSpeed key -> key of the run config that determines its value.
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
    "communication_data_type": "backend.reduce_dtype",
    "zero_force_ds_cpu_optimizer": "backend.deepspeed.zero_optimization.offload_optimizer",
    "activation_checkpointing": "model.activation_checkpointing",
    "checkpoint": "checkpoint.*",
    "data_efficiency": "data.*",
    "dataloader_drop_last": "data.*",
}

#: The keys of DeepSpeed's own loggers, which other backends do not have.
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

#: The other top-level keys of DeepSpeed 0.19 that have an effect in this project, with their types. All other keys are
#: refused, because DeepSpeed ignores unknown keys without an error.
PASSED_THROUGH: dict[str, type] = {
    "zero_optimization": dict,
    "zero_allow_untested_optimizer": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_python_gc": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "log_level": str,
    "aio": dict,
    "comms_logger": dict,
    "flops_profiler": dict,
    "timers": dict,
}

#: The keys of ``zero_optimization`` that do not change the results. Check this before you add a key.
SAME_NUMBERS = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
    HPZ,
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
)

#: Each key that can change the results -> the value with which the key changes nothing.
OTHER_NUMBERS: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}

#: The replacement for DeepSpeed's own Muon, which gives other numbers.
_MUON_HERE = "set optimizer.name to muon and optimizer.muon.* instead, which give the same numbers under every backend"
#: The replacement for MiCS (``mics_shard_size``), which DeepSpeed 0.19 does not have.
_HYBRID_HERE = "set backend.name to fsdp and backend.fsdp.shard_group_size, which shards within groups of ranks"
_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,), HPZ: (3,)}
_TYPES = {"offload_optimizer": dict, "offload_param": dict, HPZ: int}
_REPLACED = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
_NOT_PASSED_ON = "not among the keys that are passed on to DeepSpeed"
_TYPE_NAMES = {dict: "an object", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def find_mistakes(backend: BackendConfig) -> Iterator[tuple[str, str]]:
    """Yield (config key, one line of explanation) for each mistake in ``backend.deepspeed``."""
    native = backend.deepspeed
    for key, mistake in (*_check_keys(native), *_check_zero(native.get("zero_optimization", {}))):
        yield f"backend.deepspeed.{key}", mistake
    try:
        json.dumps(native, allow_nan=False)
    except ValueError:
        yield "backend.deepspeed", "every number must be finite, found NaN or Infinity"
    if not backend.allow_different_numbers:
        cure = "remove it, or set backend.allow_different_numbers to true, which labels the run and its metrics"
        for key in changes_of_numbers(backend):
            yield f"backend.deepspeed.{key}", f"changes the numbers, which are the same under every backend; {cure}"
    if native and backend.name != "deepspeed":
        cure = 'set backend.name to "deepspeed" or drop backend.deepspeed (--set backend.deepspeed={})'
        yield "backend.deepspeed", f"set, but backend.name is {backend.name}; {cure}"


def changes_of_numbers(backend: BackendConfig) -> list[str]:
    """Return the keys of ``backend.deepspeed`` that can make the results differ from those of other backends."""

    def value_of(key: str) -> Any:
        value: Any = backend.deepspeed
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    return [key for key, neutral in OTHER_NUMBERS.items() if value_of(key) not in (None, neutral)]


def keys_of_deepspeed(content: dict[str, Any]) -> list[str]:
    """Return DeepSpeed's keys if a config file is DeepSpeed's own JSON. Return [] for a run config."""
    own = [key for key in content if key in (*PASSED_THROUGH, *OWNED_BY_RUN, *MONITORS)]
    return [] if sections_of_run(content) else [key for key in own if key not in Config.model_fields]


def sections_of_run(content: dict[str, Any]) -> list[str]:
    """Return the keys of a config file that are sections of a run config, and not keys of DeepSpeed."""
    return [key for key in content if key in Config.model_fields and key not in OWNED_BY_RUN]


def _check_keys(native: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in native.items():
        if key == "optimizer" and isinstance(value, dict) and str(value.get("type")).lower() == "muon":
            yield key, f"DeepSpeed's own Muon is not used; remove this and {_MUON_HERE}"
        elif key in OWNED_BY_RUN:
            yield key, f"the run config owns this; remove it and set {OWNED_BY_RUN[key]} instead"
        elif key in MONITORS:
            yield key, "logs under DeepSpeed only; remove it and set logging.sinks instead, which every backend uses"
        elif key not in PASSED_THROUGH:
            nearest = nearest_name(key, [*PASSED_THROUGH, *OWNED_BY_RUN])
            hint = f"did you mean {nearest}?" if nearest else f"remove it; those are {', '.join(PASSED_THROUGH)}"
            yield key, f"{_NOT_PASSED_ON}; {hint}"
        else:
            yield from _check_type(key, value, PASSED_THROUGH[key])


def _check_zero(zero: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(zero, dict):
        return  # _check_keys reports the wrong type
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield "zero_optimization.stage", f"must be 0, 1, 2 or 3, found {json.dumps(stage)}"
        return
    for key in zero:
        if key.startswith("mics_"):
            yield f"zero_optimization.{key}", f"DeepSpeed 0.19 has no MiCS; remove this, or {_HYBRID_HERE}"
        elif "muon" in key:
            yield f"zero_optimization.{key}", f"DeepSpeed's own Muon is not used; remove this and {_MUON_HERE}"
        elif key in _REPLACED:
            instead = f'{_REPLACED[key]}: {{"device": "cpu"}}'
            yield f"zero_optimization.{key}", f"DeepSpeed no longer supports this; set {instead} instead"
        elif key not in SAME_NUMBERS and f"zero_optimization.{key}" not in OTHER_NUMBERS:
            nearest = nearest_name(key, SAME_NUMBERS, cutoff=0.8)
            hint = f"did you mean {nearest}?" if nearest else "remove it"
            yield f"zero_optimization.{key}", f"{_NOT_PASSED_ON}; {hint}"
    for key, stages in _STAGES.items():
        if key in zero:
            yield from _check_type(f"zero_optimization.{key}", zero[key], _TYPES[key])
            if stage not in stages:
                needed = " or ".join(map(str, stages))
                yield f"zero_optimization.{key}", f"needs zero_optimization.stage {needed}, which is {stage}"


def _check_type(key: str, value: Any, expected: type) -> Iterator[tuple[str, str]]:
    accepted = (int, float) if expected is float else (expected,)
    if type(value) not in accepted:
        yield key, f"must be {_TYPE_NAMES[expected]}, found {json.dumps(value)}"
