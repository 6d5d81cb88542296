"""DeepSpeed: one class for stage 0, one for stages 1 to 3, the keys of its config, and refused configs."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends import Backend, create_backend
from pipeline.backends.eager_optimizers import AdamW
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.model.gpt2 import allocate_model, build_model
from pipeline.model.precision import AutocastModel, Bf16ViewModel
from tests.pipeline.backends.conftest import (
    MostElements,
    backend_config,
    backend_section,
    is_compiled,
    make_backend,
    micro_batch,
)
from tests.pipeline.conftest import tiny_config
from tests.support.runs import (
    TINY_BYTE_RUN,
    TRAIN,
    child_environment,
    curve_of,
    merged,
    ranks_command,
    read_curve,
    train_arguments,
)

pytest.importorskip("deepspeed")

from pipeline.backends import deepspeed_zero
from pipeline.backends.deepspeed_zero import Zero0Backend, ZeroBackend, engine_config
from pipeline.backends.local_state import ParameterState
from pipeline.backends.zero_state import FullyPartitionedState, PartitionedState


def native_config(config: Config) -> dict[str, Any]:
    return engine_config(config, plan_batch(config, 1), cpu_adam=True)


@pytest.mark.parametrize(
    ("stage", "backend_class", "state_class"),
    [
        (0, Zero0Backend, ParameterState),
        (1, ZeroBackend, PartitionedState),
        (2, ZeroBackend, PartitionedState),
        (3, ZeroBackend, FullyPartitionedState),
    ],
)
def test_classes_of_the_stages(world: World, stage: int, backend_class: type[Backend], state_class: type) -> None:
    backend = make_backend(f"zero{stage}", world)
    assert type(backend) is backend_class
    assert type(backend.state) is state_class
    assert f"ZeRO-{stage} with fused AdamW" in backend.describe()
    assert not backend.engine.tput_timer.config.enabled, "this timer waits for a GPU in each micro-step"


def test_deepspeed_learns_the_class_of_an_optimizer_once(world: World) -> None:
    for _ in range(2):
        make_backend("zero1", world)
    known = deepspeed_zero.ZERO_SUPPORTED_OPTIMIZERS
    assert known.count(AdamW) == 1 and len(known) == len(set(known))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fragments_are_the_initial_fp32_weights(world: World, stage: int, precision: str) -> None:
    """DeepSpeed's own bf16 masters would be rounded to bf16."""
    backend = make_backend(f"zero{stage}", world, run={"precision": precision})
    whole = dict(build_model(backend_config("ddp").model, 1).named_parameters())
    fragments = {fragment.name: fragment for fragment in backend.fragments()}
    assert fragments.keys() == whole.keys()
    for name, fragment in fragments.items():
        assert fragment.start == 0
        assert torch.equal(fragment.weight, whole[name].detach().flatten()), name
    dtypes = backend.dtypes()
    assert dtypes.pop("compute weights") == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_3_has_one_whole_weight_at_a_time(world: World, precision: str) -> None:
    """Weights that DeepSpeed keeps gathered are turned off, because every weight of this model is that small."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = tiny_config(
        run={"precision": precision}, backend={"name": "deepspeed", "deepspeed": {"zero_optimization": zero}}
    )
    model = allocate_model(config.model, "meta")
    sizes = [parameter.numel() for parameter in model.parameters()]
    with MostElements(model) as most:
        backend = create_backend(model, config, world, plan_batch(config, 1))
        backend.draw_weights(1)
    assert max(sizes) <= most.of_the_weights <= max(sizes) + len(sizes), "a placeholder has one element"
    backend.model.assert_tied()


@pytest.mark.parametrize(("stage", "wrapped"), [(0, Bf16ViewModel), (1, AutocastModel), (3, AutocastModel)])
def test_bf16_of_stage_0_is_a_view(world: World, stage: int, wrapped: type) -> None:
    backend = make_backend(f"zero{stage}", world, run={"precision": "bf16"})
    assert isinstance(backend.compute.module, wrapped)
    assert backend(micro_batch()[0], method="logits").dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_steps_update_nothing_and_the_last_does(world: World, stage: int) -> None:
    backend: Any = make_backend(f"zero{stage}", world)
    before = {fragment.name: fragment.weight.clone() for fragment in backend.fragments()}
    backend.accumulate(*micro_batch(0), 1 / 32, is_last=False)
    assert all(torch.equal(fragment.weight, before[fragment.name]) for fragment in backend.fragments())
    backend.accumulate(*micro_batch(1), 1 / 32, is_last=True)
    assert backend.step(1e-3) > 0
    assert not any(torch.equal(fragment.weight, before[fragment.name]) for fragment in backend.fragments())
    assert backend.engine.global_steps == 1


def test_the_engine_is_compiled(world: World) -> None:
    backend: Any = make_backend("zero1", world, run={"compile": True})
    assert is_compiled(backend.engine.module)
    assert not is_compiled(make_backend("zero1", world).compute.module)


class TestEngineConfig:
    def test_the_batch_is_that_of_the_run_config(self) -> None:
        native = native_config(backend_config("zero2"))
        assert (native["train_micro_batch_size_per_gpu"], native["gradient_accumulation_steps"]) == (2, 2)
        assert native["steps_per_print"] > backend_config("zero2").schedule.max_steps

    @pytest.mark.parametrize(("stage", "clipping"), [(0, 0.0), (1, 0.5), (2, 0.5), (3, 0.5)])
    def test_stage_0_does_not_clip_by_itself(self, stage: int, clipping: float) -> None:
        config = backend_config(f"zero{stage}", optimizer={"grad_clip": 0.5})
        assert native_config(config)["gradient_clipping"] == clipping

    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_bf16_accumulates_in_fp32(self, stage: int) -> None:
        native = native_config(backend_config(f"zero{stage}", run={"precision": "bf16"}))
        assert ("bf16" in native) == (stage > 0)
        if stage > 0:
            assert native["bf16"]["enabled"]
            assert native["data_types"] == {"grad_accum_dtype": "fp32"}

    @pytest.mark.parametrize(
        ("dtype", "ranks", "sent"), [("fp32", 2, "fp32"), ("bf16", 2, "bf16"), ("bf16", 1, "fp32")]
    )
    def test_dtype_of_reductions(self, dtype: str, ranks: int, sent: str) -> None:
        """In bf16, DeepSpeed would reduce in bf16 by default. One rank sends nothing, so nothing is rounded."""
        for precision in ("fp32", "bf16"):
            backend = {**backend_section("zero1"), "reduce_dtype": dtype}
            config = tiny_config(backend=backend, run={"precision": precision})
            native = engine_config(config, plan_batch(config, ranks), cpu_adam=True)
            assert native["communication_data_type"] == sent

    def test_torch_keeps_its_linear_unless_asked(self) -> None:
        asked = {"stage": 3, "memory_efficient_linear": True}
        for section, expected in (({"stage": 3}, False), (asked, True)):
            config = tiny_config(backend={"name": "deepspeed", "deepspeed": {"zero_optimization": section}})
            assert native_config(config)["zero_optimization"] == {"stage": 3, "memory_efficient_linear": expected}
            assert config.backend.deepspeed["zero_optimization"] == section, "the run config is not changed"

    def test_a_key_that_changes_the_numbers_labels_the_backend(self, world: World) -> None:
        section = {**backend_section("zero1", prescale_gradients=True), "allow_different_numbers": True}
        config = tiny_config(backend=section)
        backend = create_backend(allocate_model(config.model, "meta"), config, world, plan_batch(config, 1))
        assert backend.describe().endswith("AdamW, different numbers: prescale_gradients")

    def test_native_keys_pass_through(self) -> None:
        config = tiny_config(backend=backend_section("zero1", steps_per_print=7, wall_clock_breakdown=True))
        native = native_config(config)
        assert (native["steps_per_print"], native["wall_clock_breakdown"]) == (7, True)

    def test_offloading_with_torchs_adamw_has_to_be_allowed(self) -> None:
        offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        config = tiny_config(backend={"name": "deepspeed", "deepspeed": {"zero_optimization": offload}})
        assert "zero_force_ds_cpu_optimizer" not in native_config(config)
        native = engine_config(config, plan_batch(config, 1), cpu_adam=False)
        assert native["zero_force_ds_cpu_optimizer"] is False


class TestRefusals:
    @pytest.mark.parametrize(
        ("native", "message"),
        [
            ({"zero_optimization": {"stage": 1, "no_such_key": 1}}, "no_such_key"),
            ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ],
    )
    def test_what_deepspeed_cannot_read(self, world: World, native: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as refused:
            make_backend_of(native, world)
        assert str(refused.value).startswith("backend.deepspeed: DeepSpeed refuses this config: ")
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("version", ["0.19.7", "0.20.0"])
    def test_a_version_that_was_not_tested(self, world: World, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deepspeed_zero.deepspeed, "__version__", version)
        expected = f"deepspeed {version} is installed; this project needs >=0.19.8,<0.20: pip install deepspeed==0.19.8"
        with pytest.raises(ConfigError, match=re.escape(expected)):
            make_backend("zero1", world)


def make_backend_of(native: dict[str, Any], world: World) -> Backend:
    config = tiny_config(backend={"name": "deepspeed", "deepspeed": native})
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan_batch(config, world.size))
    backend.draw_weights(1)
    return backend


def test_without_a_compiler_torchs_adamw_takes_the_offloaded_state(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("no\ncompiler")

    class NoCpuAdam:
        __init__ = fail

    monkeypatch.setattr(deepspeed_zero, "DeepSpeedCPUAdam", NoCpuAdam)
    with caplog.at_level(logging.WARNING):
        backend = make_backend_of({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, world)
    assert "cannot be built here (no compiler); offloading with torch's AdamW" in caplog.text
    assert "with fused AdamW" in backend.describe()
    assert deepspeed_zero.cpu_adam_problem() == "no compiler"
    backend.accumulate(*micro_batch(), 1 / 16, is_last=True)
    assert backend.step(1e-3) > 0


def test_deepspeed_is_quiet() -> None:
    assert logging.getLogger("DeepSpeed").level == logging.WARNING
    assert deepspeed_zero.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "precision", "compiled", "tolerance"),
    [("zero1", "fp32", False, 1e-4), ("zero2", "amp_fp16", False, 2e-2), ("zero3", "bf16", True, 2e-2)],
)
def test_a_gpu_has_the_curve_of_a_cpu(
    backend: str,
    precision: str,
    compiled: bool,
    tolerance: float,
    byte_corpus: Path,
    tmp_path: Path,
    gpu: torch.device,
) -> None:
    """In a process of its own, because DeepSpeed chooses its accelerator once per process."""
    sections = merged(
        TINY_BYTE_RUN,
        {
            "model": {"n_head": 1, "n_embd": 64},
            "data": {"path": str(byte_corpus)},
            "schedule": {"max_steps": 6},
            "evaluation": {"tasks": []},
        },
    )
    expected = curve_of("ddp", tmp_path / "cpu", sections)
    changed = merged(sections, {"run": {"device": gpu.type, "precision": precision, "compile": compiled}})
    command = ranks_command(1, TRAIN, train_arguments(backend, tmp_path / "gpu", changed))
    subprocess.run(command, env={**child_environment(), "DS_ACCELERATOR": gpu.type}, check=True, timeout=300)
    assert read_curve(tmp_path / "gpu").largest_loss_difference(expected) <= tolerance
