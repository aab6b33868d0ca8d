"""Metrics that a validation has logged, as the score of a global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fl_adapters.participant.local_result import without_prefix

_SET = "/dataloader_idx_"


def plain_metrics(logged: Mapping[str, float], sizes: Sequence[int]) -> dict[str, float]:
    """Metrics without a prefix that means "validation": "val_loss" becomes "loss".

    `sizes` are the examples of each validation set. With several sets Lightning logs "val_loss/dataloader_idx_0" and
    so on. These are kept, and "loss" is added: their mean, weighted by the sizes of the sets.
    """
    plain: dict[str, float] = {}
    per_set: dict[str, list[tuple[float, int]]] = {}
    for name, value in logged.items():
        short = without_prefix(name)
        plain.setdefault(short, value)
        metric, marker, number = short.rpartition(_SET)
        if marker and number.isdecimal() and int(number) < len(sizes):
            per_set.setdefault(metric, []).append((value, sizes[int(number)]))
    for metric, values in per_set.items():
        if len(values) == len(sizes):
            plain.setdefault(metric, sum(v * n for v, n in values) / max(sum(n for _, n in values), 1))
    return plain
