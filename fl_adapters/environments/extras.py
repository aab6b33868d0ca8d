"""The error for a missing extra `[trust]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fl_runtime.errors import ConfigError


@contextmanager
def needs_cryptography() -> Iterator[None]:
    """Turn a missing `cryptography` in this block into a ConfigError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "cryptography":
            raise
        raise ConfigError(
            "certificates need the package cryptography, which is not installed",
            fix="pip install 'fl-adapters[trust]'",
        ) from None
