"""FSDP2 on a GPU gives the steps of a CPU. In a file of its own: the process group of the other tests is for CPUs."""

from __future__ import annotations

import pytest
import torch

from pipeline.backends.ddp import DdpBackend
from pipeline.distributed.world import World
from pipeline.model.gpt2 import build_model
from tests.pipeline.backends.conftest import GPU_MODEL, backend_config, losses_and_norms, make_backend


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"),
    [("fp32", False, 1e-5), ("fp32", True, 1e-5), ("amp_fp16", False, 1e-2), ("bf16", True, 1e-2)],
)
def test_steps_on_a_gpu_are_those_of_a_cpu(gpu_world: World, precision: str, compiled: bool, tolerance: float) -> None:
    """FSDP2 compiles each block, and uses NCCL's collectives instead of those for CPUs."""
    run = {"precision": precision, "compile": compiled, "device": gpu_world.device.type}
    found = losses_and_norms(make_backend("fsdp", gpu_world, run=run, model=GPU_MODEL))
    config = backend_config("ddp", model=GPU_MODEL)
    alone = World(0, 1, 0, torch.device("cpu"))
    assert found == pytest.approx(
        losses_and_norms(DdpBackend(build_model(config.model, 1), config, alone)), rel=tolerance
    )
