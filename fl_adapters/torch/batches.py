"""How many examples a torch data loader and its batches hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def size_of(loader: Any, batches: float, ranks: int) -> int | None:
    """Rows of `batches` batches per rank of a loader, at most those of its data set; None without a length."""
    try:
        rows = len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None
    batch_size = getattr(loader, "batch_size", None)
    if not isinstance(batch_size, int) or math.isinf(batches):
        return rows
    return min(rows, int(batches) * batch_size * ranks)


def rows_of(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)
