"""Train with DeepSpeed ZeRO, stages 0 to 3. Only this file imports DeepSpeed."""

import copy
import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.nn as nn
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS, ZeRORuntimeException
from deepspeed.utils import groups, set_z3_leaf_modules
from packaging.version import Version
from pydantic import ValidationError
from torch import Tensor

from data_tools.errors import one_line
from pipeline.backends.base import Backend
from pipeline.backends.compilation import compile_blocks, compiles_blocks
from pipeline.backends.extension_lock import wait_for_build_elsewhere
from pipeline.backends.gradient_clipping import clip_and_step
from pipeline.backends.local_state import LocalState, ParameterState
from pipeline.backends.optimizer import build_adamw, build_optimizer, describe_optimizer, parameter_groups
from pipeline.backends.zero_allocation import AllocatedOnRead, use_placeholders
from pipeline.backends.zero_state import FullyPartitionedState, PartitionedState
from pipeline.config.deepspeed_keys import changes_of_numbers
from pipeline.config.schema import Config, OptimizerConfig
from pipeline.data.batch_plan import BatchPlan
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.model.gpt2 import GPT2, Block, place_model
from pipeline.model.precision import AutocastModel, ComputeModel, replicated_compute
from pipeline.model.recomputation import recompute_blocks

log = logging.getLogger(__name__)

# Before 0.19.8, ZeRO-0 scaled bf16 gradients wrongly, and the weights of ranks diverged under ZeRO-1 in bf16.
TESTED_VERSIONS = (Version("0.19.8"), Version("0.20"))

_BUILD_ERRORS = (RuntimeError, ImportError, OSError)  # raised by a build without a working C++ compiler


def _configure_process() -> None:
    """Configure DeepSpeed for this process: fewer messages, and no build of unused operators."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates. Users cannot avoid this warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # On CPUs, DeepSpeed would compile an operator for inference at the start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_configure_process()


class DeepSpeedBackend(Backend):
    """The base class for all ZeRO stages."""

    in_precision: Callable[[GPT2, str, torch.device], ComputeModel]  # creates the module that the engine wraps

    def __init__(self, model: GPT2, config: Config, world: World, plan: BatchPlan) -> None:
        super().__init__(model, config, world)
        _check_version()
        self.stage = config.backend.zero_stage
        self.changes = changes_of_numbers(config.backend)
        self.engine = self._start_engine(model, config, world, plan)
        self.compute: Any = self.engine
        self.optimizer: Any = self.engine.optimizer
        self.state = self._create_state()
        self.state.connect_optimizer(self.ranks_per_copy)

    def _start_engine(self, model: GPT2, config: Config, world: World, plan: BatchPlan) -> Any:
        self._allocate(model, world.device)
        recompute_blocks(model)
        compute = self.in_precision(model, self.precision, world.device)
        build_rest = partial(_build_cpu_adam, config=config.optimizer) if config.backend.offloads("optimizer") else None
        optimizer = build_optimizer(dict(model.named_parameters()), config, world, build_rest)
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:  # ZeRO would refuse optimizers that it does not know
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)
        if self.stage == 3:
            # A block's weights are gathered and released at once, outside of its compiled forward pass.
            set_z3_leaf_modules(model, [Block])
        native = engine_config(config, plan, cpu_adam=isinstance(optimizer, DeepSpeedCPUAdam))
        _check_readable(native)
        try:
            if self.stage == 3:
                deepspeed.zero.Init(
                    module=AllocatedOnRead(model, world.device),
                    config_dict_or_path=native,
                    # With hpZ, Init creates these groups unless a backend of this process has created them before.
                    zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
                )
            engine, *_ = deepspeed.initialize(model=compute, optimizer=optimizer, config=native)
        except (ValueError, AssertionError, NotImplementedError, ZeRORuntimeException) as error:
            raise _refused(error) from error
        if config.run.compiles:
            # In stage 3, hooks gather weights between the blocks and would break one graph into many.
            if self.stage == 3 or compiles_blocks(world):
                compile_blocks(model)
            else:
                engine.compile(compile_kwargs={"dynamic": False})
        return engine

    def _allocate(self, model: GPT2, device: torch.device) -> None:
        """Allocate the weights of a model on the device ``meta``, without initial values."""
        place_model(model, device)

    @abstractmethod
    def _create_state(self) -> LocalState:
        """Return the training state on this rank. The engine has the optimizer and the weights."""

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(is_last)
        scale = self._loss_scale_outside_engine()
        loss: Tensor = self.engine(tokens, targets)
        self.engine.backward(self.weighted(loss, loss_weight * scale), scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # only counts the micro-step
        return loss.detach()

    @abstractmethod
    def _loss_scale_outside_engine(self) -> float:
        """Return the factor by which ``accumulate`` multiplies the loss. It is 1 if the engine scales the loss."""

    def state_was_loaded(self, updates: int) -> None:
        super().state_was_loaded(updates)
        self.engine.global_steps = updates

    def describe(self) -> str:
        optimizer = describe_optimizer(self.engine.basic_optimizer)
        label = f", different numbers: {', '.join(self.changes)}" if self.changes else ""
        return f"DeepSpeed {deepspeed.__version__} ZeRO-{self.stage} with {optimizer}{label}"

    def _accumulation_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype | None = self.engine.get_data_types()[1]
        return dtype

    def close(self) -> None:
        self.engine.destroy()
        deepspeed.comm.destroy_process_group()  # releases the process groups that DeepSpeed keeps in globals


class Zero0Backend(DeepSpeedBackend):
    """The backend for ZeRO stage 0. Every rank has all fp32 weights.

    DeepSpeed's own bf16 mode would accumulate gradients in bf16, so the model casts the weights itself. DeepSpeed
    reports no norm of fp32 gradients, so this class clips the gradients itself.
    """

    in_precision = staticmethod(replicated_compute)

    def _create_state(self) -> LocalState:
        return ParameterState(self.optimizer, dict(self.model.named_parameters()), self.state_names)

    def _loss_scale_outside_engine(self) -> float:
        return self.loss_scaler.factor

    def _update(self) -> Tensor:
        norm = clip_and_step(self.optimizer, self.model.parameters(), self.loss_scaler.factor, self.max_norm)
        self.engine.zero_grad()
        self.engine.step()  # only counts the step, because parameters without gradients are skipped
        return norm


class ZeroBackend(DeepSpeedBackend):
    """The backend for ZeRO stages 1 to 3.

    Stage 1 shards the optimizer state. Stage 2 also shards the gradients. Stage 3 also shards the weights.
    """

    in_precision = AutocastModel

    def _allocate(self, model: GPT2, device: torch.device) -> None:
        """Allocate the weights in the compute dtype. Under ZeRO-3, create placeholders instead of the weights."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        if self.stage == 3:
            use_placeholders(model, dtype)
        else:
            place_model(model.to(dtype), device)

    def _create_state(self) -> LocalState:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        state = FullyPartitionedState if self.stage == 3 else PartitionedState
        return state(self.engine, names, self.state_names)

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        if self.loss_scaler.dynamic:
            self.optimizer.override_loss_scale(self.loss_scaler.factor)
        return super().accumulate(tokens, targets, loss_weight, is_last=is_last)

    def _loss_scale_outside_engine(self) -> float:
        return 1.0

    def _update(self) -> float:
        """Clip and update with the engine. The engine skips the update if the gradient norm is not finite."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed computed no gradient norm"
        assert self.engine.was_step_applied() == math.isfinite(norm), "DeepSpeed took a step that is not finite"
        return float(norm)


def create_deepspeed_backend(model: GPT2, config: Config, world: World, plan: BatchPlan) -> DeepSpeedBackend:
    """Return the backend for the ZeRO stage that the config selects."""
    backend = ZeroBackend if config.backend.zero_stage > 0 else Zero0Backend
    return backend(model, config, world, plan)


def engine_config(config: Config, plan: BatchPlan, *, cpu_adam: bool) -> dict[str, Any]:
    """Return the config for DeepSpeed's engine: ``backend.deepspeed`` and the keys that the run config determines.

    Args:
        cpu_adam: whether DeepSpeed's CPUAdam updates offloaded optimizer state. If False, torch's AdamW updates it.
    """
    native = {
        "steps_per_print": config.schedule.max_steps + 1,  # DeepSpeed never prints
        "timers": {"throughput": {"enabled": False}},  # this timer waits for the GPU twice per micro-step
        **config.backend.deepspeed,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        "communication_data_type": "bf16" if config.backend.reduces_in_bf16(plan.world_size) else "fp32",
    }
    stage = config.backend.zero_stage
    if stage > 0:
        native["gradient_clipping"] = config.optimizer.grad_clip
    if stage == 3:
        # DeepSpeed's default replaces torch's F.linear for every model in the process.
        native["zero_optimization"] = {"memory_efficient_linear": False, **config.backend.zero}
    if stage > 0 and config.run.precision == "bf16":
        native["bf16"] = {"enabled": True, "check_grad_overflow": True}
        native["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.backend.offloads("optimizer") and not cpu_adam:
        native["zero_force_ds_cpu_optimizer"] = False
    return native


def _check_readable(native: dict[str, Any]) -> None:
    try:
        DeepSpeedConfig(copy.deepcopy(native))
    except Exception as error:  # values of wrong types raise any error
        raise _refused(error) from error


def _refused(error: Exception) -> ConfigError:
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        key = ".".join(map(str, mistake["loc"]))
        reason = f"{error.title}: {key}: {mistake['msg']}, found {mistake['input']!r}"
    else:
        reason = one_line(error)
    return ConfigError(f"backend.deepspeed: DeepSpeed refuses this config: {reason}")


def _build_cpu_adam(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return DeepSpeed's CPUAdam for offloaded state, or torch's AdamW if CPUAdam cannot be built."""
    every = list(parameters)
    groups = parameter_groups(every, config.weight_decay)
    wait_for_build_elsewhere(CPUAdamBuilder.NAME)
    try:
        adam = DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adamw_mode=True)
    except _BUILD_ERRORS as error:
        reason = one_line(error)[:200]
        log.warning("DeepSpeed's CPUAdam cannot be built here (%s); offloading with torch's AdamW", reason)
        return build_adamw(every, config, torch.device("cpu"))
    adam.register_step_pre_hook(_forget_bias_correction)
    return adam


def _forget_bias_correction(adam: Any, *_: object) -> None:
    """Make CPUAdam's next step compute beta^n directly from the step count n.

    A resumed run then rounds in the same way as an uninterrupted run.

    By default, CPUAdam multiplies its stored beta^(n-1) by beta. It computes beta^n directly only if beta has changed
    since the previous step. Therefore, this function takes one step with changed betas, on tensors that are not used.
    """
    unused = [torch.zeros(1) for _ in range(4)]  # weight, gradient and moments
    adam.ds_opt_adam.adam_update(adam.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, True, *unused)


def cpu_adam_problem() -> str | None:
    """Build DeepSpeed's CPUAdam if it is not built yet. Return the error message if this fails, otherwise None."""
    wait_for_build_elsewhere(CPUAdamBuilder.NAME)
    try:
        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except _BUILD_ERRORS as error:
        return one_line(error)[:200]
    return None


def _check_version() -> None:
    lowest, beyond = TESTED_VERSIONS
    if not lowest <= Version(deepspeed.__version__) < beyond:
        raise ConfigError(
            f"backend.name: deepspeed {deepspeed.__version__} is installed; this project needs >={lowest},<{beyond}: "
            f"pip install deepspeed=={lowest}"
        )
