"""Files that hold secrets, or that a running process reads while they change."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError


def write_file(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Replace `path` in one step, so that whoever reads it finds the old or the new. secret: mode 0600, else 0644.

    Raises StoreError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(fresh, 0o600 if secret else 0o644)
            os.replace(fresh, path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}", fix="check the folder and its disk") from None


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a file; ConfigError, saying `what` it should be, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        fix = unpack_first(path.parent) or "check the path, or get a fresh kit"
        raise ConfigError(f"there is no {what} here: {error.strerror}", where=str(path), fix=fix) from None


def unpack_first(kit: Path) -> str:
    """What to do about a kit's folder that is missing since the kit is still packed; empty if that is not so."""
    archive = kit if kit.suffix == ".zip" else kit.parent / f"{kit.name}.zip"
    return f"the kit is packed: first run `fl-adapters unpack {archive}`" if archive.is_file() else ""


def check_private(path: Path) -> None:
    """ConfigError if others than the owner may read a secret file (POSIX)."""
    if os.name != "posix":
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"the private key can be read by others (mode {mode:04o})",
            where=str(path),
            fix=f"chmod 600 {path}; if others may have read it, ask for a new certificate",
        )
