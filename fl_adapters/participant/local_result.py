"""The result of a site's local training in one round, the update that carries it, and the names of metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_runtime.types import Arrays, Content, Metrics, Task, Update

_PREFIXES = ("val_", "val/", "valid_", "valid/", "validation_", "validation/")


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


@dataclass(frozen=True)
class UpdateHeader:
    """What all updates of a session have in common.

    Attributes:
        job: Name of the job.
        site: Name of the site.
        attempt: Number of the site's process in this run, from 1.
        content: What the arrays of updates hold.
        encoding: The adapter's own encoding of updates whose content is "encoded".
    """

    job: str
    site: str
    attempt: int
    content: Content = "weights"
    encoding: str = ""

    def update(self, task: Task, arrays: Arrays, result: LocalResult, extras: Arrays) -> Update:
        """Return the update that answers `task`. Arrays and extras are borrowed."""
        return Update(
            job=self.job,
            round=task.round,
            stage=task.stage,
            site=self.site,
            attempt=self.attempt,
            base_version=task.version,
            arrays=arrays,
            num_examples=int(result.num_examples),
            local_steps=result.local_steps,
            metrics=result.metrics,
            extras=extras,
            content=self.content,
            encoding=self.encoding,
        )


def without_prefix(name: str) -> str:
    """Return a metric's name without a prefix for "validation": "val_loss" becomes "loss".

    Args:
        name: Name of a metric in the framework.

    Returns:
        The name as the server sees it.
    """
    return next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p) and name != p), name)
