"""The ranks of a run agree on what the main rank decides, and a device that is missing is a clear error."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from data_tools.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.distributed import world as world_module
from pipeline.distributed.world import World, join_world
from pipeline.errors import CheckpointError, ConfigError, LostRankError, MainRankError
from tests.support.runs import child_environment, ranks_command, run_ranks

CPU = torch.device("cpu")


class SecondRank(World):
    """Rank 1 of two, which receives what rank 0 has broadcast."""

    received: Any

    def broadcast(self, item: Any) -> Any:
        assert item == (None, "None", None), "only rank 0 decides"
        return SecondRank.received


def test_the_main_rank_returns_its_result() -> None:
    assert World(0, 1, 0, CPU).call_on_main(lambda: 7) == 7


def test_an_error_of_the_main_rank_is_raised_there() -> None:
    def fail() -> None:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        World(0, 1, 0, CPU).call_on_main(fail)


def test_other_ranks_return_the_result_of_the_main_rank() -> None:
    SecondRank.received = (7, "None", None)
    assert SecondRank(1, 2, 1, CPU).call_on_main(lambda: pytest.fail("called on rank 1")) == 7


@pytest.mark.parametrize("status", [2, LostRankError.exit_status])
def test_other_ranks_exit_with_the_status_of_the_main_rank(status: int) -> None:
    SecondRank.received = (None, "damaged", status)
    with pytest.raises(MainRankError, match="damaged") as caught:
        SecondRank(1, 2, 1, CPU).call_on_main(lambda: None)
    assert caught.value.exit_status == status


class WithFullDisk(World):
    """A rank of two. A call on the other rank has failed."""

    def gather(self, item: Any) -> list[Any]:
        other = f"rank {1 - self.rank} on b: the disk is full" if self.is_main else "the disk is full"
        return [item, other] if self.is_main else [other, item]

    def broadcast(self, item: Any) -> Any:
        return item if self.is_main else (None, "the disk is full", 2)


def test_an_error_on_one_rank_is_raised_on_all_ranks() -> None:
    with pytest.raises(DataError, match="^rank 1 on b: the disk is full$") as caught:
        WithFullDisk(0, 2, 0, CPU).call_on_each(lambda: 7)
    assert caught.value.is_known_to_all
    with pytest.raises(MainRankError):
        WithFullDisk(1, 2, 1, CPU).call_on_each(lambda: 7)


def test_each_rank_returns_its_own_result() -> None:
    assert World(0, 1, 0, CPU).call_on_each(lambda: 7) == 7


def test_the_main_rank_keeps_the_type_of_its_own_error() -> None:
    def fail() -> None:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="^damaged$"):
        WithFullDisk(0, 2, 0, CPU).call_on_each(fail)


def test_collectives_of_one_rank(world: World) -> None:
    values = torch.tensor([1.0, 2.0])
    assert world.sum(values).tolist() == [1.0, 2.0] and world.sum(values) is not values
    assert world.max(3) == 3
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"
    world.barrier()
    assert world.with_cpu_group().device == CPU


@pytest.mark.parametrize(("given", "named"), [({}, r"run\.device"), ({"device_option": "--device"}, "--device")])
def test_a_missing_device_is_a_config_error(given: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``train`` has no option --device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = rf"^{named}: this machine has no cuda; available: .*cpu, or auto$"
    with pytest.raises(ConfigError, match=message), join_world(RunConfig(device="cuda"), **given):  # type: ignore[arg-type]
        pass


def test_a_rank_without_a_gpu_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "local rank 2 has no GPU: this process sees 2 with CUDA_VISIBLE_DEVICES=0,1, which must name .* GPU;"
    with pytest.raises(ConfigError, match=message), join_world(RunConfig()):
        pass


@pytest.mark.parametrize(("size", "variable"), [(64, None), (65, "1")])
def test_with_many_ranks_gloo_does_not_connect_all_pairs(
    size: int, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable decides how many sockets a rank has. A group in threads shows this with fewer ranks."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")  # restores the variable after the test
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    for name in ("open_store", "choose_gloo_interface"):
        monkeypatch.setattr(world_module, name, lambda *_: HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    world_module._start_process_group(World(0, size, 0, torch.device("cpu")))
    assert os.environ.get("TORCH_GLOO_LAZY_INIT") == variable
    sockets = count_sockets_of_a_group(ranks=12)
    assert sockets < 12 * 6 if variable else sockets > 12 * 10


def count_sockets_of_a_group(ranks: int) -> int:
    """Create a group of gloo with one thread per rank, and return how many files it has opened."""
    store = HashStore()
    before = psutil.Process().num_fds()

    def join(rank: int) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        return dist.ProcessGroupGloo(store, rank, ranks, options)

    with ThreadPoolExecutor(ranks) as threads:
        groups = list(threads.map(join, range(ranks)))
    opened = psutil.Process().num_fds() - before
    assert len(groups) == ranks
    return opened


@pytest.mark.gpu
def test_nccl_collectives_of_one_rank(gpu_world: World) -> None:
    assert dist.get_backend() == "nccl"
    assert torch.cuda.current_device() == gpu_world.device.index == 0
    values = torch.tensor([1.0, 2.0], device=gpu_world.device)
    assert gpu_world.sum(values).tolist() == [1.0, 2.0]
    assert gpu_world.max(3) == 3
    assert gpu_world.gather("a") == ["a"]
    assert gpu_world.broadcast("a") == "a"
    gpu_world.barrier()
    assert gpu_world.with_cpu_group().device == CPU


#: Each rank adds its number to a tensor on its own device. The ranks exchange objects on both groups. One call fails.
TWO_RANKS = """
import sys

import pytest
import torch

from data_tools.errors import DataError
from pipeline.config.schema import RunConfig
from pipeline.distributed.world import join_world
from pipeline.errors import MainRankError

with join_world(RunConfig(device=sys.argv[1])) as world:
    if world.device.type == "cuda":
        assert world.device.index == torch.cuda.current_device() == world.rank
    assert world.sum(torch.tensor(world.rank + 1.0, device=world.device)).item() == 3
    assert world.max(world.rank) == 1
    for each in (world, world.with_cpu_group()):
        assert each.gather(world.rank) == [0, 1]
        assert each.broadcast(world.rank) == 0
        each.barrier()

    def fail_on_rank_1():
        if world.rank == 1:
            raise DataError("the disk is full")

    with pytest.raises(DataError if world.is_main else MainRankError, match="^rank 1 on .*: the disk is full$"):
        world.call_on_each(fail_on_rank_1)
    assert world.call_on_each(lambda: world.rank) == world.rank
    print("done")
"""


@pytest.fixture
def two_ranks(tmp_path: Path) -> Path:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    return script


def test_collectives_of_two_ranks(two_ranks: Path) -> None:
    result = run_ranks(2, two_ranks, ["cpu"], timeout_s=180)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == 2


@pytest.mark.gpu
def test_two_ranks_use_two_gpus(two_ranks: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    subprocess.run(ranks_command(2, two_ranks, ["cuda"]), env=child_environment(), check=True, timeout=180)
