"""Password-protected zip files for startup kits, which often travel by mail.

The files are encrypted with AES-256 in the format of WinZip (AE-2), which 7-Zip also reads. `pyzipper` reads and writes
it. The format derives the key with only 1,000 iterations of PBKDF2, so a short password could be guessed:
`new_password` makes one of 120 bits.
"""

from __future__ import annotations

import io
import secrets
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import pyzipper

from fl_runtime.errors import ConfigError
from fl_runtime.trust.files import write_file

_MAX_BYTES = 2**24
_DATE = (2026, 1, 1, 0, 0, 0)  # a fixed date: the same kit makes the same headers
_UNIX = 3  # "made by", so that other programs read the file modes
_END = b"PK\x05\x06"  # signature of the end record, which holds the number of entries at offset 10
_ENCRYPTED = 1  # bit of the flags
_OVERHEAD_BYTES = 28  # of an encrypted file: salt (16), password check (2), authentication code (10)
_AE_2 = {"force_wz_aes_version": 2}  # AE-1 would store a check sum of the unencrypted contents
_DAMAGED = (RuntimeError, ValueError, KeyError, EOFError, OverflowError, struct.error, zlib.error, pyzipper.BadZipFile)
"""What pyzipper raises for a wrong password (RuntimeError) and for damaged or unsupported archives."""


def new_password() -> str:
    """Make a random password of about 120 bits, in groups that can be read out over the telephone.

    Returns:
        Five groups of five letters and digits, separated by hyphens.
    """
    letters = "abcdefghjkmnpqrstuvwxyz23456789"
    return "-".join("".join(secrets.choice(letters) for _ in range(5)) for _ in range(5))


def write_archive(path: Path, folder: Path, password: str) -> None:
    """Pack the files of a kit, with their modes, into an encrypted zip file.

    Args:
        path: The zip file, which gets mode 0600.
        folder: The kit's folder. Its name becomes the folder in the zip file.
        password: Password, not empty.

    Raises:
        StoreError: If the zip file cannot be written.
    """
    data = io.BytesIO()
    with pyzipper.AESZipFile(data, "w", encryption=pyzipper.WZ_AES, encryption_kwargs=_AE_2) as archive:
        archive.setpassword(password.encode())
        for file in sorted(folder.iterdir()):
            entry = archive.zipinfo_cls(f"{folder.name}/{file.name}", _DATE)
            entry.create_system = _UNIX
            entry.external_attr = (stat.S_IFREG | stat.S_IMODE(file.stat().st_mode)) << 16
            archive.writestr(entry, file.read_bytes())
    write_file(path, data.getvalue(), secret=True)


def read_archive(path: Path, folder: Path, password: str) -> None:
    """Unpack the zip file of a kit.

    Files that were private (no permissions for group and others) become private again. Folders within the zip file are
    ignored: all files are written directly into `folder`.

    Args:
        path: The zip file.
        folder: Folder to create; it must not exist.
        password: The password with which the zip file was made.

    Raises:
        ConfigError: If the password is wrong, the zip file is damaged, too large, not encrypted or holds a file with an
            unusable name, or if `folder` exists. Nothing is written then.
        StoreError: If a file cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already", fix="choose another folder")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError
        files = _files(path.read_bytes(), password)
    except OSError as error:
        raise ConfigError(
            f"the archive cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from None
    except _DAMAGED:
        raise ConfigError(
            "the archive cannot be opened", where=str(path), fix="check the password and the file"
        ) from None
    folder.mkdir(parents=True, mode=0o700)
    for name, data, private in files:
        write_file(folder / name, data, secret=private)


def _files(data: bytes, password: str) -> list[tuple[str, bytes, bool]]:
    """Return (name, contents, whether it is private) of every file, after checking all that a stranger could forge."""
    with pyzipper.AESZipFile(io.BytesIO(data)) as archive:
        archive.setpassword(password.encode())
        entries = archive.infolist()
        (count,) = struct.unpack_from("<H", data, data.rindex(_END) + 10)  # zipfile may skip damaged entries
        if len(entries) != count or sum(entry.file_size for entry in entries) > _MAX_BYTES:
            raise ValueError
        names = [_checked_name(entry) for entry in entries]
        contents = [archive.read(entry) for entry in entries]
        private = [not (entry.external_attr >> 16) & 0o077 for entry in entries]
    return list(zip(names, contents, private, strict=True))


def _checked_name(entry: Any) -> str:
    """Return the file name of an entry. Raises ValueError for unusable names and damaged entries."""
    name = str(entry.orig_filename).rpartition("/")[2]  # as stored, before zipfile cuts and normalises it
    usable = name not in ("", ".", "..") and "\\" not in name and "\0" not in name
    encrypted = entry.wz_aes_version is not None and entry.flag_bits & _ENCRYPTED
    # pyzipper compares the authentication code only at the end of the contents, so their size must be right
    complete = entry.compress_type != pyzipper.ZIP_STORED or entry.compress_size - entry.file_size == _OVERHEAD_BYTES
    if not (usable and encrypted and complete):
        raise ValueError
    return name
