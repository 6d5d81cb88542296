"""Memory of the host that is freed and needed again a moment later."""

from __future__ import annotations

import ctypes

# Of mallopt(3), from <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, for its next allocation.

    By default glibc gets each block of more than 32 MiB from the kernel and gives it back when it is freed. Logits and
    gradients are such blocks: in each step the kernel would clear all their pages anew, for a fifth of the step. Other
    threads share the main thread's memory, as in memory of their own large blocks cannot be kept: gloo's, which
    collect what ranks send.

    Returns:
        Whether the C library does so; without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl; Windows
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all([bool(mallopt(setting, value)) for setting, value in settings])
