"""The errors for missing extras: `[trust]`, and those of the frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fl_runtime.errors import ConfigError

_PURPOSES = {"cryptography": "certificates", "pyzipper": "encrypted kits"}


_OURS = ("fl_adapters", "fl_runtime", "integrations")


@contextmanager
def needs_extra(extra: str, what: str, *, also: str = "") -> Iterator[None]:
    """Turn a missing package of another project in this block into an ImportError that says what to install.

    Args:
        extra: Name of the extra that brings the package.
        what: What is missing, such as "Keras or its backend".
        also: What else to install, which the extra does not bring.

    Raises:
        ImportError: A package of another project is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        raise ImportError(f"{what} is missing: pip install 'fl-adapters[{extra}]'{also} ({error})") from error


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
