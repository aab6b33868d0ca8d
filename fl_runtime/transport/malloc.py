"""Settings of the C library's allocator on Linux for processes that carry large messages. Elsewhere they do nothing."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

_LARGEST_KEPT_BYTES = 2**25 - 2**16
_M_ARENA_MAX = -8  # malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed memory, so that frames reuse it.

    glibc returns freed memory to the system when it amounts to twice the largest block freed so far, up to a block of
    32 MiB (mallopt(3), M_MMAP_THRESHOLD). With frames of 2 MiB that happens all the time, and getting the pages back
    costs up to a quarter of a round. Allocating and freeing one large, untouched block raises the limit.

    Call it only where messages carry the weights. Freed arrays of the user's script are kept as well. For arrays of
    4 MiB or more NumPy asks for huge pages, and Linux may fill the freed space with them later (khugepaged;
    Documentation/admin-guide/mm/transhuge.rst, max_ptes_none).
    """
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)


def use_one_arena() -> None:
    """Let all threads allocate from one malloc arena; for servers, before they start threads.

    By default glibc has up to eight arenas per core (mallopt(3), M_ARENA_MAX), and memory freed in one does not serve
    another. A server then holds up to twice the memory, depending on which thread got which message. The setting lasts
    as long as the process.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has one arena, and no such function
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)
