"""The result of a site's local training in one round, as `submit` and `exchange` take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_runtime.types import Metrics


@dataclass(frozen=True)
class LocalResult:
    """What a site reports about its local training, beside the trained arrays.

    Attributes:
        num_examples: Number of training examples, at least 1: the weight of this site in the average.
        local_steps: Number of optimizer steps made, or 0 if the trainer does not count them.
        metrics: Training metrics of this round by name, such as "train_loss".
    """

    num_examples: int
    local_steps: int
    metrics: Metrics

    def with_personal(self, metrics: Metrics) -> LocalResult:
        """Add the metrics of the phase that trained the personal model: "train_loss" as "train_personal_loss".

        Args:
            metrics: Metrics of that phase, under the same names as those of this result.

        Returns:
            A new result. Where a name exists in both, the value of this result is kept.
        """
        personal = {name.replace("train_", "train_personal_", 1): value for name, value in metrics.items()}
        return replace(self, metrics={**personal, **self.metrics})
