"""How the C library on Linux keeps memory that large messages have used and freed. Elsewhere these do nothing."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

_LARGEST_KEPT_BYTES = 2**25 - 2**16
_M_ARENA_MAX = -8  # malloc.h


def keep_freed_memory() -> None:
    """The C library gives freed memory back to the system as soon as there is twice as much of it as the largest block
    that was ever freed, up to a block of 32 MiB (mallopt(3), M_MMAP_THRESHOLD). After frames of 2 MiB that is all the
    time, and fetching the pages again costs up to a quarter of a round. One block that is never touched and freed makes
    it wait for 64 MiB. Only where messages carry the weights: an array of the script's own that has been freed
    stays too, and where it had 4 MiB or more, for which NumPy asks for huge pages, Linux may fill its place with them
    at any time later (khugepaged; Documentation/admin-guide/mm/transhuge.rst, max_ptes_none)."""
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)


def share_one_heap() -> None:
    """For a process whose work is to serve models over gRPC, before it starts threads: they all take memory from one
    heap. With heaps of their own (mallopt(3), M_ARENA_MAX: up to eight a core) what one has freed does not serve
    another, and a server holds up to twice the memory, by which thread happened to get which message. It lasts as long
    as the process."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has one heap, and no such function
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)
