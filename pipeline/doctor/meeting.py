"""What each of the doctor's two ranks runs: ``torchrun -m pipeline.doctor.meeting cpu``."""

from __future__ import annotations

import sys

import torch

from pipeline.config.schema import RunConfig
from pipeline.distributed.world import join_world


def meet(device: str) -> None:
    """Join the other ranks and count them."""
    with join_world(RunConfig.model_validate({"device": device})) as world:
        total = world.sum(torch.ones((), device=world.device))
        assert total.item() == world.size


if __name__ == "__main__":
    meet(sys.argv[1])
