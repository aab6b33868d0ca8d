"""Files of kits and authorities: atomic replacement, permissions, and errors that say what to do."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fl_runtime.errors import ConfigError, StoreError

STATE_VARIABLE = "FL_ADAPTERS_STATE"
"""Environment variable with the folder for what changes, for kits that cannot be written; see working_kit.py."""


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


def open_lock(path: Path) -> int:
    """Open a file to lock, which is made if it is missing. The caller closes the descriptor, and with it the lock.

    Args:
        path: The file, in the folder that it locks.

    Returns:
        A descriptor for reading and writing.

    Raises:
        StoreError: The folder cannot be written.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(path.parent, error) from None


def unwritable(folder: Path, error: OSError) -> StoreError:
    """Return the error for a folder of keys that cannot be written.

    Args:
        folder: The folder.
        error: Why not.
    """
    return StoreError(f"{folder} cannot be written: {error.strerror}", fix="check the folder's owner and its disk")


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    A file of root's may be readable by a group, so that a service without root's rights can read a mounted secret.

    Args:
        path: The file.

    Raises:
        ConfigError: If the group or others have any permission.
    """
    if os.name != "posix":
        return
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & (0o037 if status.st_uid == 0 != os.geteuid() else 0o077):
        raise ConfigError(
            f"the private key can be read by others (mode {mode:04o})",
            where=str(path),
            fix=f"chmod 600 {path}; if others may have read it, ask for a new certificate",
        )


def check_unwritable(path: Path) -> None:
    """Check that nobody else can write a file or folder, or replace it by way of a folder above it.

    It must belong to this process's user or to root, and no group or other user may have write permission. A group of
    the owner's or this user's own, with the user's name and nobody else in it, counts as that user. A folder above it
    may be writable if it is sticky, like /tmp. Does nothing on Windows.

    Args:
        path: A file or folder of a kit or an authority; if it is missing, the folders above it are checked.

    Raises:
        ConfigError: If somebody else can write there; the message has the command that puts it right.
    """
    if os.name != "posix":
        return
    for place, is_above in _ways_to(path):
        try:
            status = place.stat()
        except OSError:
            continue  # a missing file is reported by its reader
        mode = stat.S_IMODE(status.st_mode)
        writers = [who for who, bit in (("group", stat.S_IWGRP), ("others", stat.S_IWOTH)) if mode & bit]
        if "group" in writers and _is_private_group(status):
            writers.remove("group")
        if writers and not (is_above and mode & stat.S_ISVTX):
            raise ConfigError(
                f"{' and '.join(writers)} can change {'what is in ' if is_above else ''}{place} (mode {mode:04o})",
                where=str(path),
                fix=f"chmod go-w {shlex.quote(str(place))}; check what is in it, since it may have been changed",
            )
        if not is_above and status.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                f"{place} belongs to another user (number {status.st_uid})",
                where=str(path),
                fix=f"chown {os.geteuid()} {shlex.quote(str(place))}, or run this as that user",
            )


def _ways_to(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a file, its target if it is a link, and all folders above both, each with whether it is such a folder."""
    seen = set()
    for place in (Path(os.path.abspath(path)), path.resolve()):
        for number, each in enumerate((place, *place.parents)):
            if each not in seen:
                seen.add(each)
                yield each, number > 0


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the group of a file has the name of its owner, or of this user, and no other member.

    Many systems set users up like this. Volumes of Kubernetes belong to root and to the group of the pod's user.
    """
    import grp
    import pwd

    try:
        group = grp.getgrgid(status.st_gid)
        users = [pwd.getpwuid(number) for number in (status.st_uid, os.geteuid())]
    except KeyError:
        return False
    return any(
        user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}
        for user in users
    )
