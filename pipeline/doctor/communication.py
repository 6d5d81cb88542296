"""How ranks will talk: libraries, this host's name, ports; and, if asked for, two ranks that really do."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.cuda import nccl

from pipeline.doctor.findings import Finding

MASTER_PORT = 29500  # torchrun's and deepspeed's default
ALL_REDUCE_TIMEOUT_S = 120


def examine_communication() -> Iterator[Finding]:
    """Libraries, host name and port."""
    yield _examine_libraries()
    yield _examine_host_name()
    yield _examine_port()


def _examine_libraries() -> Finding:
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Finding("collectives", "problem", "this torch has no NCCL", "install a CUDA build of torch for Linux")
    if not dist.is_gloo_available():
        cure = "install torch from pytorch.org or PyPI"
        return Finding("collectives", "problem", "this torch has no gloo; checkpoints and CPU ranks need it", cure)
    release = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else ""  # type: ignore[no-untyped-call]
    return Finding("collectives", "ok", f"gloo, NCCL {release}" if release else "gloo")


def _examine_host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        cure = f'echo "127.0.0.1 {name}" >> /etc/hosts (several nodes: the address that the others reach)'
        return Finding("host name", "problem", f"{name} has no address ({error}): ranks could not meet", cure)
    return Finding("host name", "ok", f"{name} is {address}")


def _examine_port() -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", MASTER_PORT))
        except OSError as error:
            cure = (
                "torchrun --standalone picks a free one; else --rdzv-endpoint HOST:PORT, deepspeed --master_port PORT"
            )
            return Finding("port", "note", f"{MASTER_PORT}, the launchers' default: {error.strerror}", cure)
    return Finding("port", "ok", f"{MASTER_PORT} is free")


def examine_ranks() -> Finding:
    """Two ranks on this machine that add a number: one a GPU where there are two, else on the CPU."""
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    try:
        ended = subprocess.run(
            [*launcher, "-m", "pipeline.doctor.meeting", device],
            capture_output=True,
            text=True,
            timeout=ALL_REDUCE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "two ranks",
            "problem",
            f"on {device} they did not meet within {ALL_REDUCE_TIMEOUT_S} s",
            "a firewall, or the wrong interface: export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo, try again",
        )
    if ended.returncode:
        reason = next((line for line in ended.stderr.splitlines() if "Error" in line), f"status {ended.returncode}")
        return Finding("two ranks", "problem", f"on {device}: {reason.strip()[:200]}", "NCCL_DEBUG=INFO shows more")
    return Finding("two ranks", "ok", f"met and added a number on {device}")
