"""Evaluation metrics of the Trainer as the score of a global model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from transformers import TrainerState, TrainingArguments

_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of quality without the prefix "eval_". Metrics of speed are left out."""
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in plain.items()
        if isinstance(value, int | float) and not name.endswith(_SPEED)
    }


class Score:
    """Score of one global model, collected over the trainer's validation sets, which HF evaluates one by one."""

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}
        self._sizes: list[int] = []

    def add(
        self, metrics: Mapping[str, float], examples: int, names: Sequence[str]
    ) -> tuple[dict[str, float], int] | None:
        """Add the evaluation of one set.

        Args:
            metrics: Metrics as HF names them.
            examples: Size of the set.
            names: Names of all sets in the order in which HF evaluates them; empty for a single set without a name.

        Returns:
            The score and the number of examples behind it, or None if other sets are still to be evaluated. The next
            call then begins a new score.
        """
        self._metrics |= plain_metrics(metrics)
        self._sizes.append(examples)
        if len(self._sizes) < len(names):
            return None
        score = pooled(self._metrics, names, self._sizes) if names else self._metrics, sum(self._sizes)
        self._metrics, self._sizes = {}, []
        return score


def pooled(metrics: dict[str, float], names: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """`metrics` of several sets ("<set>_loss"), and for each metric the mean over the sets, weighted by their sizes."""
    means: dict[str, float] = {}
    for metric in [m.removeprefix(f"{names[0]}_") for m in metrics if m.startswith(f"{names[0]}_")]:
        values = [metrics.get(f"{name}_{metric}") for name in names]
        if None not in values:
            means[metric] = sum(v * n for v, n in zip(values, sizes, strict=True) if v is not None) / sum(sizes)
    return {**means, **metrics}


def point_to_best(args: TrainingArguments, state: TrainerState, version: int) -> None:
    """Let HF's record of the best model name the best global round, with its checkpoint and score if they exist."""
    row = next((r for r in state.log_history if r.get("federation_round") == version and r.get("step")), None)
    step = row["step"] if row else None
    folder = os.path.join(args.output_dir, f"checkpoint-{step}")
    metric = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
    scores = [r[metric] for r in state.log_history if r.get("step") == step and metric in r]
    state.best_global_step = step
    state.best_model_checkpoint = folder if os.path.isdir(folder) else None
    state.best_metric = scores[-1] if scores else None
