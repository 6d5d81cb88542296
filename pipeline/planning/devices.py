"""What can be bought, as its makers publish it, and this machine, measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from pipeline.distributed.device import GIB, matmul_dtype, measure_matmul_ceiling
from pipeline.errors import ConfigError

GB, TERA = 10**9, 10**12
THIS = "this"


@dataclass(frozen=True)
class Device:
    """One rank's device and the links of a machine with ``per_node`` of them."""

    name: str
    memory_bytes: int
    reserved_bytes: int  # not for tensors: driver context, collectives, libraries
    fragmentation: float  # share of the rest that an allocator is taken to lose
    bf16_flops: float  # FLOP/s of dense matrix products, fp32 accumulation
    fp32_flops: float  # FLOP/s without TF32
    node_bytes_per_s: float  # one way, between devices of a node
    network_bytes_per_s: float  # one way, of each device between nodes
    host_bytes_per_s: float  # one way, between the device and the host's memory
    per_node: int
    mfu: float  # share of the FLOP/s that a training step is assumed to reach

    @property
    def usable_bytes(self) -> int:
        """What is left for tensors."""
        return int((self.memory_bytes - self.reserved_bytes) * (1 - self.fragmentation))

    def flops(self, precision: str) -> float:
        """FLOP/s of the precision's matrix products."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


def _gpu(
    name: str, memory_gib: float, bf16: float, fp32: float, node: float, network: float, host: float, mfu: float
) -> Device:
    """From published figures: GiB as torch reports them, TFLOP/s, GB/s one way."""
    return Device(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        reserved_bytes=1 * GIB,
        fragmentation=0.05,
        bf16_flops=bf16 * TERA,
        fp32_flops=fp32 * TERA,
        node_bytes_per_s=node * GB,
        network_bytes_per_s=network * GB,
        host_bytes_per_s=host * GB,
        per_node=8,
        mfu=mfu,
    )


#: NVIDIA's data sheets: dense TFLOP/s, NVLink or PCIe one way. Networks: DGX H100 and H200 have 400 Gbit/s a GPU,
#: DGX A100 200; the small cards are taken to share 100 Gbit/s among eight. MFU: 0.40 is what llm.c reports for GPT-2 on
#: eight H100, 0.5 lies below its 0.60 on eight A100; the small cards are a guess.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100-80gb", 79.1, bf16=989, fp32=67, node=450, network=50, host=64, mfu=0.40),
        _gpu("h200", 139.8, bf16=989, fp32=67, node=450, network=50, host=64, mfu=0.40),
        _gpu("a100-80gb", 79.1, bf16=312, fp32=19.5, node=300, network=25, host=32, mfu=0.50),
        _gpu("a100-40gb", 39.4, bf16=312, fp32=19.5, node=300, network=25, host=32, mfu=0.50),
        _gpu("rtx4090", 23.5, bf16=165, fp32=82.6, node=32, network=1.56, host=32, mfu=0.45),
        _gpu("l4", 22.0, bf16=121, fp32=30.3, node=32, network=1.56, host=32, mfu=0.40),
    )
}
DEVICE_NAMES = (*DEVICES, THIS)


def find_device(name: str, precision: str) -> Device:
    """A device of the table, or this machine's.

    Raises:
        ConfigError: no such device.
    """
    if name == THIS:
        return _this_machine(precision)
    if name not in DEVICES:
        raise ConfigError(f"--device: {name} is not known; known are {', '.join(DEVICE_NAMES)}")
    return DEVICES[name]


def _this_machine(precision: str) -> Device:
    """The first GPU, or the CPU with all of its memory for one rank; matrix products and copies are measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure_matmul_ceiling(device, matmul_dtype(precision))
    copied = _copy_bytes_per_s(device)
    if device.type == "cuda":
        memory, reserved = torch.cuda.get_device_properties(device).total_memory, GIB
    else:
        memory, reserved = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), GIB // 2
    return Device(
        name=f"this {device.type}",
        memory_bytes=memory,
        reserved_bytes=reserved,
        fragmentation=0.05 if device.type == "cuda" else 0.0,
        bf16_flops=measured,
        fp32_flops=measured,
        node_bytes_per_s=copied,
        network_bytes_per_s=copied,
        host_bytes_per_s=copied,
        per_node=max(1, torch.cuda.device_count()),
        mfu=0.5,
    )


def _copy_bytes_per_s(device: torch.device) -> float:
    """Through the host's memory, which is what ranks of one machine talk through at worst."""
    source = torch.ones(1 << 24, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    return source.numel() / min(_seconds_of_copy(target, source) for _ in range(3))


def _seconds_of_copy(target: torch.Tensor, source: torch.Tensor) -> float:
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started
