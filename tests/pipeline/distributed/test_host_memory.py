"""What is freed is there for the next step."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

#: Blocks as torch asks for them, filled and freed again; prints the pages that the kernel gave for the last twenty. The
#: first twenty are not counted: the seven odd ends of aligned blocks that a thread sets aside each move the next block.
PROGRAM = """
import ctypes, resource, sys
from pipeline.distributed.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc, block, size = ctypes.CDLL(None), ctypes.c_void_p(), 48 << 20
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
    ctypes.memset(block.value, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_was_freed_is_not_asked_of_the_kernel_again() -> None:
    pages_of_twenty_blocks = 20 * (48 << 20) // resource.getpagesize()
    assert new_pages("given back") > 0.9 * pages_of_twenty_blocks
    assert new_pages("kept") < 0.1 * pages_of_twenty_blocks
