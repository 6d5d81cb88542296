"""DeepSpeed ZeRO stages 0 to 3. The only file that imports DeepSpeed."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.nn as nn
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from packaging.version import Version
from pydantic import ValidationError
from torch import Tensor

from pipeline.backends.base import Backend, Fragment, StepResult
from pipeline.backends.extension_lock import expect_no_dead_build
from pipeline.backends.loss_scaling import LossScaler
from pipeline.backends.optimizer import (
    build_adamw,
    parameter_groups,
    set_learning_rate,
    skip_unless_finite,
    unscale_and_clip,
)
from pipeline.backends.zero_state import state_of_stage
from pipeline.config.schema import Config, OptimizerConfig
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import AutocastModel, replicated_compute

log = logging.getLogger(__name__)

# Before 0.19.8 ZeRO-0 scaled bf16 gradients wrongly and ZeRO-1 let bf16 ranks diverge.
TESTED_VERSIONS = (Version("0.19.8"), Version("0.20"))

_BUILD_ERRORS = (RuntimeError, ImportError, OSError)  # what a missing or unfit C++ compiler may throw


class DeepSpeedBackend(Backend):
    """See :class:`pipeline.backends.base.Backend`."""

    def __init__(self, model: GPT2, config: Config, world: World, plan: BatchPlan) -> None:
        super().__init__(model, LossScaler.for_precision(config.run.precision))
        _refuse_untested_version()
        _quiet_down()
        native = config.backend.deepspeed
        self.stage = int(native.get("zero_optimization", {}).get("stage", 0))
        self.replicated = self.stage == 0
        self.max_norm = config.optimizer.grad_clip
        self.precision = config.run.precision
        # bf16 below stage 1 is a bf16 view over fp32 parameters: DeepSpeed's own keeps bf16 gradients.
        self.engine_is_bf16 = config.run.precision == "bf16" and self.stage > 0
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        initial = _copies(model) if self.engine_is_bf16 else {}
        self.engine = self._start_engine(model, config, world, plan)
        if config.run.compile is True:
            self.engine.compile(compile_kwargs={"dynamic": False})
        self.state = state_of_stage(self.engine, self.stage, names, self.parameter_shapes)
        if initial:
            self._restore_masters(initial)

    def _start_engine(self, model: GPT2, config: Config, world: World, plan: BatchPlan) -> Any:
        offloads = _offloads_optimizer(config.backend.deepspeed)
        compute: nn.Module
        if self.stage == 0:
            compute = replicated_compute(model, config.run.precision, world.device)
        else:
            compute = AutocastModel(model, config.run.precision, world.device)
        if offloads:
            optimizer = _build_cpu_adam(model.parameters(), config.optimizer)
        else:
            optimizer = build_adamw(model.parameters(), config.optimizer, world.device)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)
        injected = engine_config(config, plan, cpu_adam=isinstance(optimizer, DeepSpeedCPUAdam))
        _refuse_what_deepspeed_cannot_read(injected)
        try:
            engine, *_ = deepspeed.initialize(model=compute, optimizer=optimizer, config=injected)
        except (ValueError, AssertionError, NotImplementedError, ZeRORuntimeException) as error:
            raise _refused(error) from error
        return engine

    @property
    def compute(self) -> nn.Module:
        """The engine."""
        return self.engine

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """See :meth:`Backend.accumulate`."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self._tell_loss_scale()
        loss = self.engine(tokens, targets)
        scale = self.loss_scaler.scale if self.stage == 0 else 1.0  # ZeRO optimizers scale by themselves
        self.engine.backward(self.weighted(loss, loss_weight * scale), scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # counts the micro-step; updates nothing
        return loss.detach()

    def _tell_loss_scale(self) -> None:
        if self.loss_scaler.dynamic and self.stage > 0:
            self.engine.optimizer.override_loss_scale(self.loss_scaler.scale)

    def step(self, learning_rate: float) -> StepResult:
        """See :meth:`Backend.step`."""
        set_learning_rate(self.engine.optimizer.param_groups, learning_rate)
        norm = self._replicated_step() if self.stage == 0 else self._zero_step()
        self.loss_scaler.update(norm)
        return StepResult(norm)

    def _replicated_step(self) -> Tensor:
        """Norm and clipping of stage 0 are ours: DeepSpeed reports no norm in fp32."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = unscale_and_clip(gradients, self.loss_scaler.scale, self.max_norm)
        if skip_unless_finite(self.engine.basic_optimizer, norm):
            self.engine.zero_grad()  # without gradients AdamW leaves a parameter and its moments alone
        self.engine.step()
        return norm

    def _zero_step(self) -> float:
        """ZeRO skips an update whose norm is not finite by itself."""
        self._tell_loss_scale()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed computed no gradient norm"
        assert self.engine.was_step_applied() == math.isfinite(norm), "DeepSpeed took a step that is not finite"
        return float(norm)

    def fragments(self) -> list[Fragment]:
        """See :meth:`Backend.fragments`."""
        return self.state.fragments()

    def state_was_loaded(self, updates: int) -> None:
        """See :meth:`Backend.state_was_loaded`."""
        for state in self.state.adam_states():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(updates))
            else:
                state["step"] = updates
        self.engine.global_steps = updates
        self.state.publish_masters()

    def describe(self) -> str:
        """See :meth:`Backend.describe`."""
        optimizer = self.engine.basic_optimizer
        fused = "fused " if optimizer.defaults.get("fused") else ""
        return f"DeepSpeed {deepspeed.__version__} ZeRO-{self.stage} with {fused}{type(optimizer).__name__}"

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        self.engine.destroy()
        # DeepSpeed keeps process groups in globals; its own call lets go of those too.
        deepspeed.comm.destroy_process_group()

    def _restore_masters(self, initial: dict[str, Tensor]) -> None:
        """DeepSpeed makes its masters from weights already rounded to bf16; give them the fp32 ones."""
        for fragment in self.fragments():
            source = initial[fragment.name].view(-1)
            fragment.weight.copy_(source[fragment.start : fragment.start + fragment.weight.numel()])
        self.state.publish_masters()

    def dtypes(self) -> dict[str, torch.dtype]:
        """See :meth:`Backend.dtypes`."""
        fragment = self.fragments()[0]
        accumulation = self.engine.get_data_types()[1] or fragment.weight.dtype
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": torch.bfloat16 if self.precision == "bf16" else fragment.weight.dtype,
            "gradient accumulation": accumulation,
            "moments": fragment.exp_avg.dtype,
        }


def engine_config(config: Config, plan: BatchPlan, *, cpu_adam: bool) -> dict[str, Any]:
    """The native DeepSpeed config: the user's, and in it what the run config owns.

    Args:
        cpu_adam: whether an offloaded optimizer is DeepSpeed's own (else torch's on the CPU).
    """
    native = dict(config.backend.deepspeed)
    zero = dict(native.get("zero_optimization", {}))
    stage = int(zero.get("stage", 0))
    if stage == 3:
        # The default replaces torch's F.linear in the whole process, for every model in it.
        zero.setdefault("memory_efficient_linear", False)
    native["zero_optimization"] = zero
    native["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    native["gradient_accumulation_steps"] = plan.accumulation
    native["gradient_clipping"] = config.optimizer.grad_clip if stage > 0 else 0.0
    native.setdefault("steps_per_print", config.schedule.max_steps + 1)  # the trainer prints
    if config.run.precision == "bf16" and stage > 0:
        native["bf16"] = {"enabled": True, "check_grad_overflow": True}
        native["data_types"] = {"grad_accum_dtype": "fp32"}
        native["communication_data_type"] = "fp32"
    if _offloads_optimizer(native) and not cpu_adam:
        native["zero_force_ds_cpu_optimizer"] = False
    return native


def _refuse_what_deepspeed_cannot_read(native: dict[str, Any]) -> None:
    try:
        DeepSpeedConfig(copy.deepcopy(native))
    except Exception as error:  # its parser throws whatever a wrong type leads to
        raise _refused(error) from error


def _refused(error: Exception) -> ConfigError:
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        key = ".".join(map(str, mistake["loc"]))
        reason = f"{error.title}: {key}: {mistake['msg']}, found {mistake['input']!r}"
    else:
        reason = " ".join(str(error).split())
    return ConfigError(f"backend.deepspeed: DeepSpeed refuses this config: {reason}")


def _offloads_optimizer(native: dict[str, Any]) -> bool:
    return native.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def _build_cpu_adam(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for offloaded state, built with the machine's C++ compiler at first use."""
    groups = parameter_groups(parameters, config.weight_decay)
    expect_no_dead_build(CPUAdamBuilder.NAME)
    try:
        return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adamw_mode=True)
    except _BUILD_ERRORS as error:
        log.warning("DeepSpeed's CPUAdam cannot be built here (%s); offloading with torch's AdamW", _shortened(error))
        return build_adamw([p for group in groups for p in group["params"]], config, torch.device("cpu"))


def cpu_adam_problem() -> str | None:
    """See :func:`pipeline.backends.cpu_adam_problem`."""
    expect_no_dead_build(CPUAdamBuilder.NAME)
    try:
        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except _BUILD_ERRORS as error:
        return _shortened(error)
    return None


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _refuse_untested_version() -> None:
    lowest, beyond = TESTED_VERSIONS
    if not lowest <= Version(deepspeed.__version__) < beyond:
        raise ConfigError(
            f"backend.name: deepspeed {deepspeed.__version__} is installed; this project needs >={lowest},<{beyond}: "
            f"pip install deepspeed=={lowest}"
        )


def _quiet_down() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # On CPUs DeepSpeed compiles an operator for inference before it starts; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _copies(model: GPT2) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
