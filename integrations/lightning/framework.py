"""The two packages that Lightning comes in: what a callback of both inherits from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_classes() -> tuple[Any, ...]:
    """`Callback` of each package that is installed. The two classes have nothing in common but their hooks.

    Raises ImportError, with the reasons, where there is neither.
    """
    found, reasons = [], []
    for package in _PACKAGES:
        try:
            found.append(import_module(package).Callback)
        except ModuleNotFoundError as error:  # not installed, or something that it needs is not
            reasons.append(f"{package}: {error}")
    if not found:
        raise ImportError(f"Lightning is missing: pip install 'fl-adapters[lightning]' ({'; '.join(reasons)})")
    return tuple(found)


def silent_logger(trainer: Any) -> Any:
    """A logger that takes everything and keeps nothing, of the package that `trainer` is of."""
    modules = [kind.__module__ for kind in type(trainer).__mro__]
    package = next(name for name in _PACKAGES if any(module.startswith(f"{name}.") for module in modules))
    return import_module(f"{package}.loggers.logger").DummyLogger()
