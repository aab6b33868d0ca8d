"""Password-protected zip files, since kits travel by mail: AES-256 as WinZip (AE-2) and 7-Zip write and read it.

Python's zipfile reads no AES and writes no encryption at all. The format stretches the password with 1,000 rounds of
PBKDF2 alone, so a short one could be guessed: `new_password` makes one of 120 bits.
Format: https://www.winzip.com/en/support/aes-encryption/
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fl_runtime.errors import ConfigError
from fl_runtime.trust.files import write_file

_SALT_BYTES, _KEY_BYTES, _CODE_BYTES = 16, 32, 10
_AES = 99
_EXTRA = struct.pack("<HHH2sBH", 0x9901, 7, 2, b"AE", 3, 0)  # AE-2, AES-256, stored
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_DATE = (46 << 9) | (1 << 5) | 1  # 2026-01-01: the same kit makes the same headers
_MAX_BYTES = 2**24


def new_password() -> str:
    """A fresh password of 120 bits, in groups that can be read out over the telephone."""
    letters = "abcdefghjkmnpqrstuvwxyz23456789"
    return "-".join("".join(secrets.choice(letters) for _ in range(5)) for _ in range(5))


def write_archive(path: Path, folder: Path, password: str) -> None:
    """Pack the files of `folder`, with their modes, into an encrypted zip."""
    body, directory, count = b"", b"", 0
    for file in sorted(folder.iterdir()):
        name, data = f"{folder.name}/{file.name}".encode(), file.read_bytes()
        stored = _encrypted(data, password)
        common = struct.pack("<HHHHHIIIHH", 51, 1, _AES, 0, _DATE, 0, len(stored), len(data), len(name), len(_EXTRA))
        mode = (stat.S_IFREG | stat.S_IMODE(file.stat().st_mode)) << 16
        central = struct.pack("<H", 51 | 3 << 8) + common + struct.pack("<HHHII", 0, 0, 0, mode, len(body))
        directory += _CENTRAL + central + name + _EXTRA
        body += _LOCAL + common + name + _EXTRA + stored
        count += 1
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    write_file(path, body + directory + _END + end, secret=True)


def read_archive(path: Path, folder: Path, password: str) -> None:
    """Unpack what `write_archive` made into `folder`, which must not exist. ConfigError on a wrong password."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already", fix="choose another folder")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError
        files = list(_files(path.read_bytes(), password))
    except OSError as error:
        raise ConfigError(
            f"the archive cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from None
    except (ValueError, struct.error):
        raise ConfigError(
            "the archive cannot be opened", where=str(path), fix="check the password and the file"
        ) from None
    folder.mkdir(parents=True, mode=0o700)
    for name, data, private in files:
        write_file(folder / name, data, secret=private)


def _files(archive: bytes, password: str) -> Iterator[tuple[str, bytes, bool]]:
    at = archive.rindex(_END)
    count, start = struct.unpack_from("<H", archive, at + 10)[0], struct.unpack_from("<I", archive, at + 16)[0]
    for _ in range(count):
        stored, name_bytes, extra_bytes = struct.unpack_from("<I4xHH", archive, start + 20)
        mode, offset = struct.unpack_from("<II", archive, start + 38)
        name = archive[start + 46 : start + 46 + name_bytes].decode().rpartition("/")[2]
        if name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError
        data_at = offset + 30 + sum(struct.unpack_from("<HH", archive, offset + 26))
        yield name, _decrypted(archive[data_at : data_at + stored], password), not (mode >> 16) & 0o077
        start += 46 + name_bytes + extra_bytes


def _encrypted(data: bytes, password: str) -> bytes:
    salt = os.urandom(_SALT_BYTES)
    key, mac_key, check = _keys(password, salt)
    hidden = _counted(data, key)
    return salt + check + hidden + hmac.digest(mac_key, hidden, "sha1")[:_CODE_BYTES]


def _decrypted(stored: bytes, password: str) -> bytes:
    salt, check = stored[:_SALT_BYTES], stored[_SALT_BYTES : _SALT_BYTES + 2]
    hidden, code = stored[_SALT_BYTES + 2 : -_CODE_BYTES], stored[-_CODE_BYTES:]
    key, mac_key, expected = _keys(password, salt)
    if check != expected or not hmac.compare_digest(code, hmac.digest(mac_key, hidden, "sha1")[:_CODE_BYTES]):
        raise ValueError
    return _counted(hidden, key)


def _keys(password: str, salt: bytes) -> tuple[bytes, bytes, bytes]:
    derived = hashlib.pbkdf2_hmac("sha1", password.encode(), salt, 1000, 2 * _KEY_BYTES + 2)
    return derived[:_KEY_BYTES], derived[_KEY_BYTES : 2 * _KEY_BYTES], derived[2 * _KEY_BYTES :]


def _counted(data: bytes, key: bytes) -> bytes:
    """AES in counter mode with a little-endian counter from 1, as the format has it."""
    blocks = b"".join(number.to_bytes(16, "little") for number in range(1, -(-len(data) // 16) + 1))
    pad = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
    return bytes(a ^ b for a, b in zip(data, pad, strict=False))
