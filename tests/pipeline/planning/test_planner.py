"""Compare plans with arithmetic, with the wrapping code, and with a real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.planned_memory import LARGEST_DIFFERENCE, MODELS, Setting, compare, start_ranks
from benchmarks.wrapped_shards import Shards, compare_fsdp, compare_small
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.hardware.device import GIB
from pipeline.model.gpt2 import parameter_count
from pipeline.model.muon_matrices import belongs_to_muon
from pipeline.planning.collectives import step_collectives
from pipeline.planning.devices import DEVICES, Device, find_device
from pipeline.planning.memory import layout_of, sizes_of
from pipeline.planning.planner import host_memory, largest_micro_batch, peak_memory, plan_run
from pipeline.planning.speed import estimate_speed
from tests.support.runs import CONFIGS

H100 = DEVICES["h100-80gb"]
OFFLOAD = "backend.deepspeed.zero_optimization.offload_optimizer"


def config_of(backend: str, *overrides: str) -> Config:
    """GPT-2 124M, 8 micro-batches of 16 sequences."""
    return load_config([CONFIGS / f"{backend}.json"], ["batch.tokens_per_step=131072", *overrides])


def elements_for_muon(config: Config) -> int:
    shapes = sizes_of(config.model).shapes
    return sum(shape.numel() for name, shape in shapes.items() if belongs_to_muon(name, shape))


def planned(backend: str, world_size: int = 8, device: Device = H100, **options: Any) -> Any:
    config = config_of(backend)
    return plan_run(backend, config, world_size, device, **{"mfu": 0.4, "tokens": 10**10, **options})


class TestState:
    """Bytes that need no trace. N is the number of parameters with padding rows."""

    N = parameter_count(config_of("ddp").model, padded=True)

    def persistent(self, backend: str, *overrides: str) -> float:
        config = config_of(backend, *overrides)
        layout = layout_of(config, plan_batch(config, 8))
        return (layout.parameters + layout.masters + layout.optimizer) / self.N

    @pytest.mark.parametrize(("backend", "ranks"), [("ddp", 1), ("fsdp", 8), ("zero1", 8), ("zero3", 8)])
    def test_muon_keeps_one_momentum_per_matrix(self, backend: str, ranks: int) -> None:
        adamw, muon = (config_of(backend, f"optimizer.name={name}") for name in ("adamw", "muon"))
        saved = layout_of(adamw, plan_batch(adamw, 8)).optimizer - layout_of(muon, plan_batch(muon, 8)).optimizer
        assert saved == pytest.approx(4 * elements_for_muon(adamw) / ranks, rel=1e-3)

    @pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero1", "zero3", "zero2_offload"])
    def test_an_average_needs_four_bytes_per_element_of_a_shard(self, backend: str) -> None:
        configs = [config_of(backend, f"averaging.ema={ema}") for ema in ("null", "0.999")]
        layouts = [layout_of(config, plan_batch(config, 8)) for config in configs]
        without, with_average = (layout.optimizer + layout.host for layout in layouts)
        assert with_average - without == pytest.approx(4 * self.N / (1 if backend == "ddp" else 8), rel=1e-3)

    def test_muon_needs_memory_and_time_for_whole_matrices(self) -> None:
        adamw, muon = (config_of("zero1", f"optimizer.name={name}") for name in ("adamw", "muon"))
        n = sum(shape.numel() for shape in sizes_of(muon.model).shapes.values())
        buffers = [layout_of(config, plan_batch(config, 8)).buffers for config in (adamw, muon)]
        assert buffers[1](0) == buffers[0](0)
        assert 0 < buffers[1](n) - buffers[0](n) < 2 * 4 * n / 8, "less than four bf16 shards"
        speeds = [estimate_speed(config, plan_batch(config, 8), H100, 0.4) for config in (adamw, muon)]
        assert speeds[1].sent_bytes > speeds[0].sent_bytes
        assert 1 < speeds[1].compute_s / speeds[0].compute_s < 1.2

    @pytest.mark.parametrize(
        ("backend", "precision", "bytes_per_element"),
        [
            ("ddp", "amp_bf16", 4 + 8),
            ("zero0", "bf16", 4 + 8),
            ("fsdp", "bf16", (4 + 8) / 8),
            ("zero1", "amp_bf16", 4 + (4 + 8) / 8),
            ("zero2", "bf16", 2 + (4 + 8) / 8),
            ("zero3", "bf16", (2 + 4 + 8) / 8),
            ("zero2_offload", "amp_bf16", 4),
            ("zero3_offload", "amp_bf16", 0),
        ],
    )
    def test_weights_masters_and_moments(self, backend: str, precision: str, bytes_per_element: float) -> None:
        assert self.persistent(backend, f"run.precision={precision}") == pytest.approx(bytes_per_element, rel=1e-3)

    @pytest.mark.parametrize(("size", "shards"), [("1", 1), ("2", 2), ("8", 8), ("null", 8)])
    def test_a_shard_group_divides_the_state(self, size: str, shards: int) -> None:
        found = self.persistent("fsdp", f"backend.fsdp.shard_group_size={size}")
        assert found == pytest.approx((4 + 8) / shards, rel=1e-3)

    def test_secondary_shards_are_counted(self) -> None:
        key = "backend.deepspeed.zero_optimization.zero_hpz_partition_size"
        saved = self.persistent("zero3", f"{key}=2") - self.persistent("zero3")
        assert saved == pytest.approx(4 / 2, rel=1e-3)
        assert self.persistent("zero3", f"{key}=1") == self.persistent("zero3")

    def test_a_peak_is_the_sum_of_its_purposes(self) -> None:
        config = config_of("zero1")
        memory = peak_memory(config, plan_batch(config, 8))
        assert memory.total == sum(vars(memory).values())
        assert memory.logits >= 16 * 1024 * 50257 * 4  # fp32 logits of the micro-batch


class TestFitting:
    L4 = DEVICES["l4"]
    BATCH = "batch.tokens_per_step=524288"  # 64 sequences per rank and step

    @pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
    def test_the_largest_micro_batch_divides_and_fits_and_the_next_does_not(self, backend: str) -> None:
        config = config_of(backend, self.BATCH)
        size = largest_micro_batch(config, plan_batch(config, 8), self.L4)
        assert 1 < size < 64
        for sequences, fits in ((size, True), (2 * size, False)):
            changed = config_of(backend, self.BATCH, f"batch.micro_batch_size={sequences}")
            assert (peak_memory(changed, plan_batch(changed, 8)).total <= self.L4.usable_bytes) == fits

    def test_speed_and_days_are_those_of_a_micro_batch_that_fits(self) -> None:
        config = config_of("fsdp", self.BATCH, "batch.micro_batch_size=64")
        plan = plan_run("fsdp", config, 8, self.L4, mfu=0.4, tokens=10**9)
        assert not plan.fits
        assert plan.micro_batch_size == plan.largest_micro_batch < 64
        assert plan.days is not None

    def test_a_plan_that_does_not_fit_has_no_days(self) -> None:
        small = find_device("l4", "amp_bf16", 8)
        config = config_of("ddp", "model.preset=gpt2-xl")
        plan = plan_run("ddp", config, 8, small, mfu=0.4, tokens=10**9)
        assert (plan.fits, plan.largest_micro_batch, plan.days) == (False, 0, None)

    @pytest.mark.parametrize(
        ("name", "device", "too_large"),
        [
            ("gpt2_350m", "a100-40gb", set()),
            ("gpt2_774m", "a100-40gb", set()),
            ("gpt2_1558m", "a100-80gb", set()),
            ("gpt2_1558m", "a100-40gb", {"ddp", "zero0"}),
        ],
    )
    def test_the_shipped_scales_fit_as_the_page_says(self, name: str, device: str, too_large: set[str]) -> None:
        """On eight GPUs, every backend fits except those that ``docs/planning.md`` names."""
        for backend in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
            config = load_config([CONFIGS / f"{backend}.json", CONFIGS / f"{name}.json"])
            memory = peak_memory(config, plan_batch(config, 8))
            assert (memory.total <= DEVICES[device].usable_bytes) == (backend not in too_large), backend


class TestHostMemory:
    """Bytes in the memory of the host, per rank. N is the number of parameters with padding rows."""

    N = TestState.N
    MATRICES, VECTORS = 512 << 20, 512 << 10  # pinned buffers of the two groups in fp32: 474 MiB and 474 KiB

    def host(self, backend: str, world_size: int, *overrides: str, device: Device = H100) -> int:
        config = config_of(backend, *overrides)
        return host_memory(config, plan_batch(config, world_size), device)

    def test_no_rank_builds_the_model_in_host_memory(self) -> None:
        assert self.host("fsdp", 8) == self.host("ddp", 8) == -(-12 * self.N // 8)
        assert self.host("zero1", 8, "run.precision=bf16") == -(-12 * self.N // 8)

    def test_one_rank_needs_memory_for_the_copy_of_the_state(self) -> None:
        assert self.host("ddp", 1) == self.host("zero2", 1) == 12 * self.N
        assert self.host("ddp", 1, "optimizer.name=muon") == 12 * self.N - 4 * elements_for_muon(config_of("ddp"))

    def test_offloaded_state_is_divided_among_ranks(self) -> None:
        """The state of each of eight ranks is 4 + 4 + 2 + 8 bytes per parameter, and the largest gradient."""
        one_micro_step = ["run.precision=bf16", "batch.micro_batch_size=16"]
        host = self.host("zero2_offload", 8, *one_micro_step, device=replace(H100, is_gpu=False))
        largest = 2 * 50304 * 768
        assert host == pytest.approx((18 + 12) / 8 * self.N + largest, rel=1e-4)

    def test_pinned_buffers_of_offloaded_state_are_rounded_up_to_powers_of_two(self) -> None:
        """With one GPU: gradients, masters and weights of two groups, and the largest gradient."""
        one_micro_step = ["batch.tokens_per_step=16384"]
        pinned = self.host("zero2_offload", 1, *one_micro_step)
        largest = 256 << 20
        assert pinned == 3 * (self.MATRICES + self.VECTORS) + largest + (8 + 12) * self.N
        for different in (
            self.host("zero2_offload", 1, *one_micro_step, device=replace(H100, is_gpu=False)),
            self.host("zero2_offload", 1, *one_micro_step, f"{OFFLOAD}.pin_memory=false"),
        ):
            assert 1.05 < pinned / different < 1.2

    def test_gradients_that_are_accumulated_in_host_memory_are_pinned_one_by_one(self) -> None:
        accumulated = self.host("zero2_offload", 1) - self.host("zero2_offload", 1, "batch.tokens_per_step=16384")
        assert 1.5 * 4 * self.N < accumulated < 2 * 4 * self.N

    def test_zero2_with_offload_in_bf16_accumulates_on_the_device(self) -> None:
        config = config_of("zero2_offload", "run.precision=bf16")
        assert layout_of(config, plan_batch(config, 1)).gradients(0) == 4 * self.N
        assert self.host("zero2_offload", 1, "run.precision=bf16") == self.host(
            "zero2_offload", 1, "run.precision=bf16", "batch.tokens_per_step=16384"
        )

    def test_zero3_pins_gradients_and_offloaded_weights(self) -> None:
        """The offloaded weights are pinned in any case."""
        pinned = self.host("zero3_offload", 1)
        assert pinned == pytest.approx((4 + 8 + 12) * self.N + 3 * self.MATRICES)
        partly = self.host("zero3_offload", 1, f"{OFFLOAD}.pin_memory=false")
        assert partly == pytest.approx((4 + 8 + 12 + 2 * 4) * self.N + self.MATRICES)


class TestSpeed:
    def test_communication_of_a_step(self) -> None:
        """Rings, N = 124M: an all-reduce sends 2 (W-1)/W times the bytes, a reduce-scatter or an all-gather (W-1)/W."""
        n = TestState.N * 7 / 8
        expected = {
            "ddp": 2 * 4 * n,
            "zero0": 2 * 4 * n,
            "zero1": (2 * 4 + 4) * n,
            "zero2": (2 * 4 + 4) * n,
            "zero3": (4 + 4) * n,
        }
        for backend, sent in expected.items():
            config = config_of(backend)
            batch = plan_batch(config, 8)
            assert batch.accumulation == 1
            assert step_collectives(config, batch).sent_bytes == pytest.approx(sent, rel=1e-6), backend

    @pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
    def test_fsdp_gathers_once_what_stays_gathered(self, precision: str) -> None:
        """Four micro-steps gather a block twice each if it is resharded. The embeddings are gathered once per step."""
        width = 2 if precision == "bf16" else 4
        root = (50304 + 1024) * 768 + 2 * 768
        for reshards, gathered in (("true", root + 4 * 2 * (TestState.N - root)), ("false", TestState.N)):
            settings = [f"backend.fsdp.reshard_after_forward={reshards}", f"run.precision={precision}"]
            config = config_of("fsdp", "batch.tokens_per_step=524288", *settings)
            batch = plan_batch(config, 8)
            assert batch.accumulation == 4
            sent = (width * gathered + 4 * TestState.N) * 7 / 8
            assert step_collectives(config, batch).sent_bytes == pytest.approx(sent, rel=1e-6)

    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_groups_send_more_bytes_but_fewer_between_nodes(self, optimizer: str) -> None:
        """16 ranks on two nodes. Groups of one rank send the bytes of DDP, and one group those of FSDP2.

        Each of the four micro-steps gathers weights. With groups of a node, no weights cross the slow network.
        """
        settings = [f"optimizer.name={optimizer}", "run.precision=bf16", "batch.tokens_per_step=1048576"]
        slow_network = replace(DEVICES["l4"], network_gb_per_s=0.1)
        speeds = {}
        for size in ("1", "8", "16", "null"):
            config = config_of("fsdp", f"backend.fsdp.shard_group_size={size}", *settings)
            batch = plan_batch(config, 16)
            speeds[size] = estimate_speed(config, batch, slow_network, 0.4)
        ddp = config_of("ddp", *settings)
        assert speeds["1"].sent_bytes == pytest.approx(step_collectives(ddp, batch).sent_bytes, rel=1e-6)
        assert speeds["16"] == speeds["null"]
        assert speeds["8"].waits.between_hosts_s < speeds["null"].waits.between_hosts_s / 2
        if optimizer == "adamw":
            root = (50304 + 1024) * 768 + 2 * 768
            gathered = 2 * (root + 4 * 2 * (TestState.N - root)) * 7 / 8
            reduced = 4 * TestState.N * 7 / 8 + 4 * TestState.N / 8  # in the group, then between two groups
            assert speeds["8"].sent_bytes == pytest.approx(gathered + reduced, rel=1e-6)

    def test_one_rank_sends_nothing_and_computes_at_the_assumed_share(self) -> None:
        plan = planned("ddp", world_size=1)
        assert plan.speed.sent_bytes == 0
        flops = 6 * (TestState.N - 1024 * 768) + 12 * 12 * 768 * 1024  # per token, Chowdhery et al. 2022
        assert plan.speed.tokens_per_s == pytest.approx(0.4 * 989e12 / flops)
        assert plan.days == pytest.approx(10**10 / plan.speed.tokens_per_s / 86400)

    def test_recomputation_costs_a_third_of_its_blocks(self) -> None:
        """The output layer is not recomputed. Its FLOPs per token are six times its number of weights."""
        flops = 6 * (TestState.N - 1024 * 768) + 12 * 12 * 768 * 1024
        blocks = 1 - 6 * 50304 * 768 / flops
        times = []
        for every in ("false", "true", "2"):
            config = config_of("ddp", f"model.activation_checkpointing={every}")
            times.append(estimate_speed(config, plan_batch(config, 1), H100, 0.4).compute_s)
        assert times[1] / times[0] == pytest.approx(1 + blocks / 3)
        assert times[2] / times[0] == pytest.approx(1 + blocks / 6)

    def test_a_slow_network_shows(self) -> None:
        within, across = planned("zero3", 8).speed, planned("zero3", 128, grow_batch=True).speed
        assert across.tokens_per_s / 128 < within.tokens_per_s / 8


class TestAgainstMeasurements:
    @pytest.mark.parametrize(("world_size", "shard_group_size"), [(3, None), (64, None), (64, 8), (4, 1)])
    def test_shards_of_fsdp(self, world_size: int, shard_group_size: int | None) -> None:
        self.check(list(compare_fsdp(world_size, shard_group_size)))

    @pytest.mark.parametrize(("backend", "world_size"), [("ddp", 1024), ("zero1", 64), ("zero2", 4096), ("zero3", 24)])
    def test_shards_of_ddp_and_deepspeed(self, backend: str, world_size: int) -> None:
        self.check(list(compare_small(backend, world_size)))

    @staticmethod
    def check(compared: list[Shards]) -> None:
        assert compared
        for shards in compared:
            assert shards.planned_bytes == shards.wrapped_bytes, shards

    def test_measured_peak(self, tmp_path: Path) -> None:
        """Run one setting of ``make plan-check`` at a size that takes seconds."""
        compared = compare(Setting("ddp", 2, "small", checkpointing=2), start_ranks().run, tmp_path)
        assert abs(compared.difference) <= LARGEST_DIFFERENCE, compared

    @pytest.mark.parametrize("model", MODELS)
    def test_a_step_is_one_micro_batch_per_rank(self, model: str) -> None:
        """The models for GPUs are not measured here, but their settings must be valid, too."""
        config = config_of("ddp", *Setting("ddp", 2, model).overrides())
        assert plan_batch(config, 2).accumulation == 1


@pytest.mark.gpu
def test_this_machine_is_its_gpu(gpu: torch.device) -> None:
    found = find_device("this", "bf16", world_size=1)
    assert found.name == "this cuda"
    assert found.memory_gib * GIB == torch.cuda.get_device_properties(gpu).total_memory
    assert found.per_node == torch.cuda.device_count()
    assert found.bf16_tflops > 1 and found.host_gb_per_s > 0.1
