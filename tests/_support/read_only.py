"""Folders that cannot be written, also by root: tests may run as root, which the modes of files do not bind."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CAPABILITIES_VERSION, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2
_PR_CAPBSET_DROP = 24


def make_read_only(folder: Path) -> None:
    """Take the right to write to a folder and to what is in it from everybody, its owner included."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)


def make_writable(folder: Path) -> None:
    """Give the owner the right to write to a folder again."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o200)


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Let this thread write only what modes of files allow, also if it is root's. Skips the test where it cannot."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    before = (ctypes.c_uint32 * 6)()
    if libc.capget(header, before) != 0:
        pytest.skip("this system has no capabilities of root to give up")
    bound = (ctypes.c_uint32 * 6)(*before)
    bound[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)  # effective; the permitted ones stay, to come back
    assert libc.capset(header, bound) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def bind_by_modes() -> None:
    """Bind a process by the modes of files before it begins, as `preexec_fn` of `subprocess.Popen`."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
