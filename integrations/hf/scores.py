"""HF's evaluation metrics as the score of a global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """HF's metrics without the "eval_" prefix, and without what tells of speed instead of quality."""
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in plain.items()
        if isinstance(value, int | float) and not name.endswith(_SPEED)
    }


def pooled(metrics: dict[str, float], names: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """`metrics`, and for several validation sets ("<set>_loss" each) also the mean over the sets, by their sizes."""
    means: dict[str, float] = {}
    for metric in [m.removeprefix(f"{names[0]}_") for m in metrics if m.startswith(f"{names[0]}_")]:
        values = [metrics.get(f"{name}_{metric}") for name in names]
        if None not in values:
            means[metric] = sum(v * n for v, n in zip(values, sizes, strict=True) if v is not None) / sum(sizes)
    return {**means, **metrics}
