"""Names of validation metrics that frameworks leave to the user."""

from __future__ import annotations

_PREFIXES = ("val_", "val/", "valid_", "valid/", "validation_", "validation/")


def without_prefix(name: str) -> str:
    """A metric's name without a prefix that says no more than "validation": "val_loss" becomes "loss"."""
    return next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p) and name != p), name)
