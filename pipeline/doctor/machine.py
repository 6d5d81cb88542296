"""Devices, memory, disk and limits of this machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.distributed.device import GIB, device_name
from pipeline.doctor.findings import Finding, Level
from pipeline.model.attention import fastest_kernel

LEAST_DISK_BYTES = 1 * GIB
#: Three checkpoints of GPT-2 124M (12 bytes a parameter; two are kept while a third is written), and their metrics.
COMFORTABLE_DISK_BYTES = 6 * GIB
COMFORTABLE_SHARED_MEMORY_BYTES = 1 * GIB
COMFORTABLE_OPEN_FILES = 4096
LEAST_OPEN_FILES = 256
SHARED_MEMORY = Path("/dev/shm")
HEAD_DIM = 64  # of all four GPT-2s


def examine_machine(folder: Path) -> list[Finding]:
    """Everything about the machine.

    Args:
        folder: where runs and data will be written; it need not exist.
    """
    return [*_examine_devices(), _examine_memory(), _examine_disk(folder), *_examine_limits()]


def _examine_devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield _finding_without_gpu()
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        says = f"{device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < total / 2:
            yield Finding(f"cuda:{index}", "note", f"{says}: another process uses it", "nvidia-smi shows which one")
        else:
            yield Finding(f"cuda:{index}", "ok", says)
    if torch.cuda.get_device_capability() < (8, 0):
        cure = "use run.precision amp_fp16 or fp32"
        yield Finding("bf16", "note", "this GPU is older than Ampere: bf16 is slow or missing on it", cure)
    with fastest_kernel(torch.device("cuda"), torch.float16, HEAD_DIM) as kernel:
        if kernel == "MATH":
            cure = "install a torch that was built for this GPU"
            yield Finding("attention", "note", "no fused kernel on this GPU: plain matrix products, slow", cure)
        else:
            yield Finding("attention", "ok", kernel)


def _finding_without_gpu() -> Finding:
    if torch.backends.mps.is_available():
        return Finding("device", "ok", "mps (one process, backend ddp)")
    says = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}; no GPU"
    if Path("/dev/nvidiactl").exists():
        reason = "its CUDA is newer than the driver" if torch.version.cuda else "it is a CPU-only build"
        cure = "install the torch that fits nvidia-smi's CUDA version, see pytorch.org"
        return Finding("device", "problem", f"there is an NVIDIA driver, but torch sees no GPU: {reason}", cure)
    return Finding("device", "ok", says)


def _examine_memory() -> Finding:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = pages * page_bytes / GIB
    if total < 2:
        cure = "use model.preset gpt2-tiny, or another machine"
        return Finding("memory", "note", f"{total:.1f} GiB: little, torch and DeepSpeed alone take one", cure)
    return Finding("memory", "ok", f"{total:.1f} GiB")


def _examine_disk(folder: Path) -> Finding:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    says = f"{free / GIB:,.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "problem", f"{existing} is not writable", "name another folder: run.out_dir, --out")
    if free < LEAST_DISK_BYTES:
        return Finding("disk", "problem", says, "python launch/checkpoint.py prune RUN --dry-run shows what could go")
    if free < COMFORTABLE_DISK_BYTES:
        cure = "enough for small models; GPT-2 124M wants 6 GiB for its checkpoints: set run.out_dir to another disk"
        return Finding("disk", "note", says, cure)
    return Finding("disk", "ok", says)


def _examine_limits() -> Iterator[Finding]:
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        says = f"{size / GIB:.2f} GiB"
        if size < COMFORTABLE_SHARED_MEMORY_BYTES:
            cure = "in a container: docker run --shm-size=8g (or --ipc=host); NCCL's ranks talk through it"
            yield Finding("shared memory", "note", says, cure)
        else:
            yield Finding("shared memory", "ok", says)
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files == resource.RLIM_INFINITY or open_files >= COMFORTABLE_OPEN_FILES:
        yield Finding("open files", "ok", "no limit" if open_files == resource.RLIM_INFINITY else f"{open_files:,}")
    else:
        level: Level = "problem" if open_files < LEAST_OPEN_FILES else "note"
        yield Finding("open files", level, f"limited to {open_files:,}", f"ulimit -n {COMFORTABLE_OPEN_FILES}")
