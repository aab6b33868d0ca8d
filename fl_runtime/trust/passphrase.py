"""The passphrase of an authority's private key, which is kept as encrypted PKCS 8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import PrivateKey, is_encrypted, key_pem, read_key
from fl_runtime.trust.files import check_private, read_file, write_file

VARIABLE = "FL_ADAPTERS_AUTHORITY_PASSPHRASE"
"""Environment variable from which commands take the passphrase."""


NEXT = "next"
"""Folder in that of the authority with the key of the new root, during a rotation."""


def no_passphrase() -> bytes:
    """Refuse to give a passphrase, for callers that have none. Raises ConfigError."""
    raise ConfigError(
        "the authority's private key has a passphrase",
        fix=f"pass --passphrase-file FILE, or set {VARIABLE}",
    )


def open_key(path: Path, passphrase: Callable[[], bytes]) -> PrivateKey:
    """Read an authority's private key.

    Args:
        path: The key's file.
        passphrase: Returns the passphrase; called only if the key is encrypted.

    Returns:
        The key.

    Raises:
        ConfigError: If the file is not such a key, others can read it, or the passphrase is not the key's.
    """
    pem = read_file(path, "authority's private key")
    check_private(path)
    return read_key(pem, str(path), passphrase() if is_encrypted(pem) else b"")


def change(authority_folder: Path, old: Callable[[], bytes], new: bytes) -> None:
    """Change the passphrase of an authority's private key. The key and its certificate stay the same.

    Args:
        authority_folder: The authority's folder.
        old: Returns the present passphrase; called only if the key is encrypted.
        new: The new passphrase; empty to keep the key without encryption.

    Raises:
        ConfigError: If the key cannot be opened, or a rotation has begun.
        StoreError: If the file cannot be written; the old one is still there then.
    """
    if (authority_folder / NEXT / "ca.key").exists():
        raise ConfigError(
            "the authority has two keys, since a rotation has begun",
            where=str(authority_folder),
            fix="end it with `fl-adapters authority finish`, then change the passphrase",
        )
    path = authority_folder / "ca.key"
    write_file(path, key_pem(open_key(path, old), new), secret=True)
