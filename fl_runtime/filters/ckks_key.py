"""The file with the sites' common key: made once, at a site, and handed to the other sites by hand."""

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

_MAGIC = b"fl-adapters ckks key 1\n"


def make_key(path: Path, settings: HomomorphicCKKS) -> str:
    """Make a key for these parameters and write it to `path`, readable by its owner alone; returns its fingerprint.

    ConfigError if there is a file already: whoever overwrites a key cannot read what was encrypted with it.
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
            os.link(name, path)  # all of it or nothing, and never over another
        finally:
            os.unlink(name)
    except FileExistsError:
        raise ConfigError("there is a key already", where=str(path), fix="use it, or choose another file") from None
    except OSError as error:
        raise ConfigError(
            f"the key cannot be written: {error.strerror}", where=str(path), fix="choose another folder"
        ) from None
    return _fingerprint(context)


def site_cipher(settings: HomomorphicCKKS, host: FilterHost) -> tuple[Cipher, str]:
    """The cipher of this site, tested, and the fingerprint of its key, which all sites must share.

    The key is `ckks.key` in the startup kit. In a simulation the sites share one: the first that comes makes it.
    """
    need_tenseal()
    if host.shared is not None:
        path = host.shared / KEY_FILE
        if not path.exists():
            try:
                make_key(path, settings)
            except ConfigError:
                if not path.exists():  # else another site was quicker
                    raise
    elif host.folder is not None:
        path = host.folder / KEY_FILE
    else:
        raise ConfigError("HomomorphicCKKS needs a startup kit with a key", where="filters", fix="give kit=")
    context, fingerprint = read_key(path, settings)
    cipher = Cipher(settings, context)
    cipher.self_test()
    return cipher, fingerprint


def read_key(path: Path, settings: HomomorphicCKKS) -> tuple[Any, str]:
    """(TenSEAL's context with the secret key, fingerprint). ConfigError for a file that cannot be used."""
    tenseal = need_tenseal()
    try:
        data = path.read_bytes()
        loose = os.name == "posix" and path.stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError(
            f"the key of HomomorphicCKKS cannot be read: {error.strerror}",
            where=str(path),
            fix=f"make it once with `fl-adapters ckks-key {path}`, and give every other site a copy, never the server",
        ) from None
    if loose:
        raise ConfigError("others may read this key", where=str(path), fix=f"chmod 600 {path}")
    try:
        if not data.startswith(_MAGIC):
            raise ValueError
        start = len(_MAGIC) + 4
        end = start + int.from_bytes(data[start - 4 : start], "little")
        parameters = json.loads(data[start:end])
        made_for = HomomorphicCKKS(**{name: parameters[name] for name in asdict(settings)})
        context = tenseal.context_from(data[end:])
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise ConfigError("this is no key of fl-adapters", where=str(path), fix="get a good copy of it") from None
    if made_for != settings:
        raise ConfigError(
            f"this key was made for {made_for.settings()}, and the job asks for {settings.settings()}",
            where=str(path),
            fix="change the job's parameters, or make a key with `fl-adapters ckks-key --job FILE`",
        )
    context.global_scale = 2.0**settings.scale_bits
    return context, str(parameters["fingerprint"])


def _fingerprint(context: Any) -> str:
    """16 hex digits of the digest of the public key."""
    public = context.serialize(
        save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return hashlib.sha256(public).hexdigest()[:16]
