"""The errors for missing extras: `[trust]`, and those of the frameworks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    with _needs("trust", _PURPOSES):
        yield


@contextmanager
def needs_metrics_extra() -> Iterator[None]:
    """Turn a missing package of the extra `[metrics]` in this block into a ConfigError that says what to install."""
    with _needs("metrics", {"prometheus_client": "the pages of `--metrics`"}):
        yield


@contextmanager
def needs_dashboard_extra() -> Iterator[None]:
    """Turn a missing package of the extra `[dashboard]` in this block into a ConfigError that says what to install."""
    with _needs("dashboard", {"starlette": "the pages of the dashboard", "uvicorn": "the pages of the dashboard"}):
        yield


@contextmanager
def _needs(extra: str, purposes: Mapping[str, str]) -> Iterator[None]:
    """Turn a missing package of an extra into a ConfigError.

    Args:
        extra: Name of the extra.
        purposes: What needs each of its packages.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in purposes:
            raise
        raise ConfigError(
            f"{purposes[package]} need the package {package}, which is not installed",
            fix=f"pip install 'fl-adapters[{extra}]'",
        ) from None
