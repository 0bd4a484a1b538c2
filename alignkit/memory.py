"""What the process does with memory that torch has freed. Torch-free."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of giving it back to the system.

    A training step frees its activations and gradients, and asks for as much again a moment later; a page that was given back must be
    cleared and mapped anew. Where the C library is not glibc, nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    # What one thread has freed is there for the next one; a thread's own arena would map each large block anew, whatever follows here.
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_TRIM_THRESHOLD, _LARGEST)
