"""Files of kits and authorities: atomic replacement, permissions, and errors that say what to do."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError


def write_file(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write or replace a file in one step, so that readers see the old contents or the new.

    Args:
        path: The file; its folder is created if missing.
        data: Its contents.
        secret: Whether only the owner may read it (mode 0600); otherwise everyone may (0644).

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o600 if secret else 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}", fix="check the folder and its disk") from None


def read_file(path: Path, what: str) -> bytes:
    """Read a file of a kit or an authority.

    Args:
        path: The file.
        what: What it should be, for the error message, such as "startup kit".

    Returns:
        Its contents.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        fix = unpack_first(path.parent) or "check the path, or get a new kit"
        raise ConfigError(f"there is no {what} here: {error.strerror}", where=str(path), fix=fix) from None


def unpack_first(kit: Path) -> str:
    """Return the advice to unpack a kit that is still a zip file.

    Args:
        kit: Folder of the kit, which is missing, or the zip file itself.

    Returns:
        The advice, or "" if there is no zip file.
    """
    archive = kit if kit.suffix == ".zip" else kit.parent / f"{kit.name}.zip"
    return f"the kit is packed: first run `fl-adapters unpack {archive}`" if archive.is_file() else ""


def check_private(path: Path) -> None:
    """Check that only the owner can read a secret file; does nothing on Windows.

    Args:
        path: The file.

    Raises:
        ConfigError: If the group or others have any permission.
    """
    if os.name != "posix":
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"the private key can be read by others (mode {mode:04o})",
            where=str(path),
            fix=f"chmod 600 {path}; if others may have read it, ask for a new certificate",
        )
