"""The two packages that Lightning comes in: what a callback of both inherits from."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_classes() -> tuple[Any, ...]:
    """`Callback` of each package that is installed. The two classes have nothing in common but their hooks.

    Raises ImportError where there is neither.
    """
    found = []
    for package in _PACKAGES:
        with suppress(ModuleNotFoundError):
            found.append(import_module(package).Callback)
    if not found:
        raise ImportError("Lightning is not installed: pip install 'fl-adapters[lightning]'")
    return tuple(found)
