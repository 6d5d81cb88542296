"""Define the devices for a plan: GPUs with the speeds of their data sheets, and this machine with measured speeds."""

import time
from dataclasses import dataclass, replace

import torch

from data_tools.limits import available_cores, memory_limit
from pipeline.errors import ConfigError
from pipeline.hardware.device import GIB, matmul_dtype, synchronize
from pipeline.hardware.matmul_ceiling import measure_matmul_ceiling

GB, TERA = 10**9, 10**12
THIS = "this"
NVLINK_LATENCY_US, PCIE_LATENCY_US, NETWORK_LATENCY_US = 3.4, 5.7, 9.6
_COPIED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}


@dataclass(frozen=True)
class Device:
    """A kind of GPU or CPU. Each node has ``per_node`` of these devices, one per rank.

    All bandwidths are for one direction.
    """

    name: str
    memory_gib: float  # as torch reports it
    bf16_tflops: float  # dense matrix products with fp32 accumulation
    fp32_tflops: float  # without TF32
    node_gb_per_s: float  # between devices of a node
    network_gb_per_s: float  # per device, between nodes
    host_gb_per_s: float  # between the device and the host's memory
    mfu: float  # assumed fraction of the FLOP/s that a training step reaches
    node_latency_us: float  # of a message between devices of a node
    network_latency_us: float = NETWORK_LATENCY_US  # of a message between nodes
    per_node: int = 8
    reserved_gib: float = 1.0  # used by the driver context, collectives and libraries
    fragmentation: float = 0.05  # assumed fraction of the remaining memory that fragmentation takes
    is_gpu: bool = True

    @property
    def usable_bytes(self) -> int:
        """Return how many bytes tensors can use. The driver, libraries and fragmentation take the rest."""
        return int((self.memory_gib - self.reserved_gib) * (1 - self.fragmentation) * GIB)

    def flops(self, precision: str) -> float:
        """Return the FLOP/s in matrix products, for a value of the config key ``run.precision``."""
        return TERA * (self.fp32_tflops if precision == "fp32" else self.bf16_tflops)


#: Dense TFLOP/s and NVLink or PCIe bandwidths are from NVIDIA's data sheets. The network bandwidths are those of DGX
#: H100, H200 and A100. Eight small cards are assumed to share 100 Gbit/s. For GPT-2, llm.c reports an MFU of 0.40 on
#: eight H100, and of 0.60 on eight A100. The table has 0.50 for A100. Other MFUs are guesses. The latencies are those
#: in ``src/graph/tuning.cc`` of NCCL 2.12 (rings, large messages).
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # name, memory, bf16, fp32, node, network, host, mfu, latency of the node
        Device("h100-80gb", 79.1, 989, 67, 450, 50, 64, 0.40, NVLINK_LATENCY_US),
        Device("h200", 139.8, 989, 67, 450, 50, 64, 0.40, NVLINK_LATENCY_US),
        Device("a100-80gb", 79.1, 312, 19.5, 300, 25, 32, 0.50, NVLINK_LATENCY_US),
        Device("a100-40gb", 39.4, 312, 19.5, 300, 25, 32, 0.50, NVLINK_LATENCY_US),
        Device("rtx4090", 23.5, 165, 82.6, 32, 1.56, 32, 0.45, PCIE_LATENCY_US),
        Device("l4", 22.0, 121, 30.3, 32, 1.56, 32, 0.40, PCIE_LATENCY_US),
    )
}


def find_device(
    name: str,
    precision: str,
    world_size: int,
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    per_node: int | None = None,
    network_gbit_per_s: float | None = None,
) -> Device:
    """Return a device from ``DEVICES``. If the name is ``this``, measure this machine in the given precision.

    Args:
        world_size: the number of ranks. If the name is ``this`` and the machine has no GPU, the ranks share its CPU
            and memory.
        memory_gib: replaces the memory of the device.
        tflops: replaces the speed in dense matrix products.
        per_node: replaces the number of devices per node.
        network_gbit_per_s: the bandwidth of all network adapters of a node together.

    Raises:
        ConfigError: the name is unknown, ``memory_gib`` is too small, or the ranks need several nodes and
            ``world_size`` is not a multiple of the number of devices per node.
    """
    device = _measure_this_machine(precision, world_size) if name == THIS else DEVICES.get(name)
    if device is None:
        raise ConfigError(f"--device: {name} is not known; known are {', '.join((*DEVICES, THIS))}")
    if memory_gib is not None:
        if memory_gib <= device.reserved_gib:
            raise ConfigError(f"--memory: must be more than the {device.reserved_gib:g} GiB of driver and libraries")
        device = replace(device, name=f"{device.name} with {memory_gib:g} GiB", memory_gib=memory_gib)
    if tflops is not None:
        device = replace(device, name=f"{device.name} with {tflops:g} TFLOP/s", bf16_tflops=tflops, fp32_tflops=tflops)
    default = " by default" if per_node is None else ""
    per_node = per_node or device.per_node
    if world_size > per_node and world_size % per_node:
        fitting = [world_size - world_size % per_node, world_size + per_node - world_size % per_node]
        raise ConfigError(
            f"--gpus: {world_size} is not a multiple of --gpus-per-host ({per_node}{default}); "
            f"numbers that would fit: {', '.join(map(str, fitting))}; or set another --gpus-per-host"
        )
    device = replace(device, per_node=per_node)
    if network_gbit_per_s is not None:
        device = replace(device, network_gb_per_s=network_gbit_per_s / 8 / device.per_node)
    return device


def _measure_this_machine(precision: str, world_size: int) -> Device:
    """Measure the speeds of this machine's first GPU. Without a GPU, measure a rank's share of the CPU.

    The bandwidth between GPUs is that of a copy from the first to the second GPU. With a single device, it is that of
    a copy from the host to the device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    tflops = measure_matmul_ceiling(device, matmul_dtype(precision)) / TERA
    host_gb_per_s = _measure_copy(torch.device("cpu"), device) / GB
    node_gb_per_s = host_gb_per_s
    if on_gpu:
        if torch.cuda.device_count() > 1:
            node_gb_per_s = _measure_copy(torch.device("cuda", 0), torch.device("cuda", 1)) / GB
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        memory_bytes = memory_limit() // world_size
        # The measurement uses the threads of one rank. All ranks together cannot use more than all cores.
        share = min(1.0, available_cores() / (torch.get_num_threads() * world_size))
        tflops, host_gb_per_s, node_gb_per_s = tflops * share, host_gb_per_s / world_size, node_gb_per_s / world_size
    return Device(
        name=f"this {device.type}" + (f", shared by {world_size} ranks" if world_size > 1 and not on_gpu else ""),
        memory_gib=memory_bytes / GIB,
        bf16_tflops=tflops,
        fp32_tflops=tflops,
        node_gb_per_s=node_gb_per_s,
        network_gb_per_s=host_gb_per_s,
        host_gb_per_s=host_gb_per_s,
        mfu=0.55 if on_gpu else 0.5,  # GPT-2 124M on one H100: 0.55 in amp_bf16, 0.62 in bf16
        node_latency_us=PCIE_LATENCY_US,
        per_node=torch.cuda.device_count() if on_gpu else world_size,
        reserved_gib=1.0 if on_gpu else 0.5,
        fragmentation=0.05 if on_gpu else 0.0,
        is_gpu=on_gpu,
    )


def _measure_copy(start: torch.device, end: torch.device) -> float:
    """Return the bytes/s of a copy. From host to GPU, the source is pinned memory."""
    is_pinned = start.type == "cpu" and end.type == "cuda"
    size = _COPIED_BYTES[end.type]
    source = torch.ones(size, dtype=torch.uint8, device=start, pin_memory=is_pinned)
    target = torch.ones(size, dtype=torch.uint8, device=end)
    times = []
    for _ in range(4):  # the first one warms up
        synchronize(end)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(start)
        synchronize(end)
        times.append(time.perf_counter() - started)
    return size / min(times)
