"""HF's evaluation metrics as the score of a global model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from transformers import TrainerState, TrainingArguments

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


def point_to_best(args: TrainingArguments, state: TrainerState, version: int) -> None:
    """Make HF's note of the best model mean the best global round: its checkpoint and score where they exist."""
    row = next((r for r in state.log_history if r.get("federation_round") == version and r.get("step")), None)
    step = row["step"] if row else None
    folder = os.path.join(args.output_dir, f"checkpoint-{step}")
    metric = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
    scores = [r[metric] for r in state.log_history if r.get("step") == step and metric in r]
    state.best_global_step = step
    state.best_model_checkpoint = folder if os.path.isdir(folder) else None
    state.best_metric = scores[-1] if scores else None
