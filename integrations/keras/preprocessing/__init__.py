"""Layers that adapt to data: what a federation compares of them, and how they adapt to the data of all sites."""

from __future__ import annotations

from .adapting import adapt
from .agreement import deriving_again, facts

__all__ = ["adapt", "deriving_again", "facts"]
