"""The file with the sites' common CKKS key. One site makes it and passes it to the other sites, never to the server.

Format: the line "fl-adapters ckks key 1", the length of the next part (4 bytes, little endian), a JSON object with the
parameters and the key's fingerprint, and TenSEAL's serialization of the context with public and secret key.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.ckks import KEY_FILE, Cipher, HomomorphicCKKS, need_tenseal
from fl_runtime.version import later_data

_NAME = b"fl-adapters ckks key "
_MAGIC = _NAME + b"1\n"


def make_key(path: Path, settings: HomomorphicCKKS) -> str:
    """Make a key and write it to a file that only its owner can read.

    Args:
        path: The file. An existing file is never replaced, since what was encrypted with its key would be lost.
        settings: Parameters of the encryption.

    Returns:
        The key's fingerprint: 16 hexadecimal digits.

    Raises:
        ConfigError: If the file exists or cannot be written, or the package `tenseal` is not installed.
    """
    context = settings.new_context()
    secret = context.serialize(
        save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    parameters = json.dumps({**asdict(settings), "fingerprint": _fingerprint(context)}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_MAGIC + len(parameters).to_bytes(4, "little") + parameters + secret)
            os.link(name, path)  # atomic, and fails if the file exists
        finally:
            os.unlink(name)
    except FileExistsError:
        raise ConfigError(
            "this file exists already", where=str(path), fix="use the key in it, or choose another file"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the key cannot be written: {error.strerror}", where=str(path), fix="choose another folder"
        ) from None
    return _fingerprint(context)


def site_cipher(settings: HomomorphicCKKS, host: FilterHost) -> tuple[Cipher, str]:
    """Load and test the cipher of a site.

    Args:
        settings: Parameters of the encryption.
        host: The site. The key is `ckks.key` in its startup kit; in a simulation, the first site makes one for all.

    Returns:
        The cipher, and the fingerprint of its key, which must be equal at all sites.

    Raises:
        ConfigError: If there is no usable key, or the package `tenseal` is not installed.
    """
    need_tenseal()
    if host.shared is not None:
        path = host.shared / KEY_FILE
        if not path.exists():
            try:
                make_key(path, settings)
            except ConfigError:
                if not path.exists():  # otherwise another site made it first
                    raise
    elif host.folder is not None:
        path = host.folder / KEY_FILE
    else:
        raise ConfigError("HomomorphicCKKS needs a startup kit with a key", where="filters", fix="pass kit=")
    context, fingerprint = read_key(path, settings)
    cipher = Cipher(settings, context)
    cipher.self_test()
    return cipher, fingerprint


def read_key(path: Path, settings: HomomorphicCKKS) -> tuple[Any, str]:
    """Read a key file.

    Args:
        path: The file.
        settings: Parameters for which the key must have been made.

    Returns:
        TenSEAL's context with the secret key, and the key's fingerprint.

    Raises:
        ConfigError: If the file cannot be read, others may read it, or its key is for other parameters.
    """
    tenseal = need_tenseal()
    try:
        data = path.read_bytes()
        shared_mode = os.name == "posix" and path.stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError(
            f"the key of HomomorphicCKKS cannot be read: {error.strerror}",
            where=str(path),
            fix=f"make it once with `fl-adapters ckks-key {path}`, and give every other site a copy, never the server",
        ) from None
    if shared_mode:
        raise ConfigError("the key can be read by others", where=str(path), fix=f"chmod 600 {path}")
    if data.startswith(_NAME) and not data.startswith(_MAGIC):
        raise later_data("the key is of another format", str(path))
    try:
        if not data.startswith(_MAGIC):
            raise ValueError
        start = len(_MAGIC) + 4
        end = start + int.from_bytes(data[start - 4 : start], "little")
        parameters = json.loads(data[start:end])
        key_settings = HomomorphicCKKS(**{name: parameters[name] for name in asdict(settings)})
        context = tenseal.context_from(data[end:])
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise ConfigError(
            "this is not a key made by `fl-adapters ckks-key`, or it is damaged",
            where=str(path),
            fix="copy the key again from the site that made it",
        ) from None
    if key_settings != settings:
        raise ConfigError(
            f"this key was made for {key_settings.settings()}, but the job asks for {settings.settings()}",
            where=str(path),
            fix="change the job's parameters, or make a key with `fl-adapters ckks-key --job FILE`",
        )
    context.global_scale = 2.0**settings.scale_bits
    return context, str(parameters["fingerprint"])


def _fingerprint(context: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the public key."""
    public = context.serialize(
        save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return hashlib.sha256(public).hexdigest()[:16]
