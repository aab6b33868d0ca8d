"""The error for a missing extra `[trust]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fl_runtime.errors import ConfigError

_PURPOSES = {"cryptography": "certificates", "pyzipper": "encrypted kits"}


@contextmanager
def needs_trust_extra() -> Iterator[None]:
    """Turn a missing package of the extra `[trust]` in this block into a ConfigError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PURPOSES:
            raise
        raise ConfigError(
            f"{_PURPOSES[package]} need the package {package}, which is not installed",
            fix="pip install 'fl-adapters[trust]'",
        ) from None
