"""The two packages in which Lightning is published, and the classes of each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_classes() -> tuple[Any, ...]:
    """The class `Callback` of each installed package, for a callback of both to inherit from.

    Raises ImportError, with the reasons, if neither package is installed.
    """
    classes, reasons = [], []
    for package in _PACKAGES:
        try:
            classes.append(import_module(package).Callback)
        except ModuleNotFoundError as error:  # not installed, or something that it needs is not
            reasons.append(f"{package}: {error}")
    if not classes:
        raise ImportError(f"Lightning is missing: pip install 'fl-adapters[lightning]' ({'; '.join(reasons)})")
    return tuple(classes)


def silent_logger(trainer: Any) -> Any:
    """A logger that discards everything, from the package of `trainer`."""
    modules = [kind.__module__ for kind in type(trainer).__mro__]
    package = next(name for name in _PACKAGES if any(module.startswith(f"{name}.") for module in modules))
    return import_module(f"{package}.loggers.logger").DummyLogger()
