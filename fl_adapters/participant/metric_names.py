"""Names of validation metrics, which frameworks leave to the user."""

from __future__ import annotations

_PREFIXES = ("val_", "val/", "valid_", "valid/", "validation_", "validation/")


def without_prefix(name: str) -> str:
    """Return a metric's name without a prefix for "validation": "val_loss" becomes "loss".

    Args:
        name: Name of a metric in the framework.

    Returns:
        The name as the server sees it.
    """
    return next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p) and name != p), name)
