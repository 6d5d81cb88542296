"""Check whether ranks can communicate.

To test two ranks on the CPU, ``check_ranks`` starts ``torchrun -m pipeline.doctor.communication cpu``.
"""

import ipaddress
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.cuda import nccl

from pipeline.config.schema import RunConfig
from pipeline.distributed.environment import launcher_variables, unset_command
from pipeline.distributed.network_interface import interface_of
from pipeline.distributed.world import join_world
from pipeline.doctor.findings import Finding

SHUTDOWN_S = 40  # torchrun gives its ranks 30 s
MASTER_PORT = 29500  # the default of torchrun and deepspeed
RANKS_TIMEOUT_S = 120


def check_collectives() -> Finding:
    """Check that torch was built with the libraries that ranks use to communicate."""
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Finding("collectives", "problem", "this torch has no NCCL", "install a CUDA build of torch for Linux")
    if not dist.is_gloo_available():
        cure = "install torch from pytorch.org or PyPI"
        return Finding("collectives", "problem", "this torch has no gloo; checkpoints and CPU ranks need it", cure)
    release = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else ""  # type: ignore[no-untyped-call]
    return Finding("collectives", "ok", f"gloo, NCCL {release}" if release else "gloo")


def check_host_name() -> Finding:
    """Check that the name of this machine resolves to one of its own addresses. Ranks connect to this name."""
    name = socket.gethostname()
    cure = (
        f'echo "127.0.1.1 {name}" >> /etc/hosts; for several nodes, use the IP address of the first one: torchrun '
        "--nnodes=N --node-rank=I --master-addr=10.0.0.1 --master-port=29500 (without --rdzv options), or deepspeed "
        "--master_addr=10.0.0.1"
    )
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding("host name", "problem", f"{name} has no address ({error}), so ranks cannot connect", cure)
    if interface_of(address) or ipaddress.ip_address(address).is_loopback:
        return Finding("host name", "ok", f"{name} is {address}")
    says = f"{name} is {address}, which is no address of this machine, so ranks may not connect"
    return Finding("host name", "note", says, cure)


def check_port() -> Finding:
    """Check that the default port of torchrun and deepspeed is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", MASTER_PORT))
        except OSError as error:
            says = f"{MASTER_PORT}, the launchers' default: {error.strerror}"
            cure = "torchrun --standalone, or choose another: --rdzv-endpoint HOST:PORT, deepspeed --master_port PORT"
            return Finding("port", "note", says, cure)
    return Finding("port", "ok", f"{MASTER_PORT} is free")


def check_variables() -> Finding:
    """Check that this shell has no environment variables of a launcher."""
    variables = launcher_variables()
    if not variables:
        return Finding("launcher", "ok", "no variables are left over from a launcher")
    says = "set in this shell: " + " ".join(f"{name}={value}" for name, value in variables.items())
    is_fatal = variables.get("WORLD_SIZE", "1") != "1" or variables.get("RANK", "0") != "0"
    return Finding("launcher", "problem" if is_fatal else "note", says, unset_command())


def check_ranks() -> Finding:
    """Check that two ranks can add numbers with a collective.

    If this machine has two GPUs, each rank uses one. Otherwise, both ranks use the CPU.
    """
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "pipeline.doctor.communication", device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, stderr = process.communicate(timeout=RANKS_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _stop(process)
        says = f"on {device} they did not connect within {RANKS_TIMEOUT_S} s"
        cure = "check the firewall; on one machine: export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo"
        cure += "; or copies between the GPUs hang: export NCCL_P2P_DISABLE=1" if device == "cuda" else ""
        return Finding("two ranks", "problem", says, cure)
    if process.returncode:
        reason = next((line for line in stderr.splitlines() if "Error" in line), f"status {process.returncode}")
        return Finding("two ranks", "problem", f"on {device}: {reason.strip()[:200]}", "NCCL_DEBUG=INFO shows more")
    return Finding("two ranks", "ok", f"connected and added a number on {device}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop torchrun with SIGTERM, because torchrun passes SIGTERM on to its ranks. SIGKILL stops only torchrun."""
    process.terminate()
    try:
        process.communicate(timeout=SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    with join_world(RunConfig.model_validate({"device": sys.argv[1]})) as world:
        assert world.sum(torch.ones((), device=world.device)).item() == world.size
