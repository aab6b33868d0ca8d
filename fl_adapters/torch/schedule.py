"""Learning-rate schedules of torch that the user made: where they end, and moving them on."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def horizon_of(scheduler: Any) -> int | None:
    """After how many of its own steps a schedule ends; None where it does not say."""
    for name in ("total_steps", "T_max", "total_iters", "t_total"):  # the last is MONAI's
        if isinstance(value := getattr(scheduler, name, None), int):
            return value
    for function in getattr(scheduler, "lr_lambdas", None) or ():
        value = getattr(function, "keywords", {}).get("num_training_steps")  # those of transformers
        if isinstance(value, int):
            return value
    return None


def advance(scheduler: Any, steps: int) -> None:
    """Move the schedule `steps` on, to where the other sites are. One that follows a metric stays where it is."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step before each
        for _ in range(steps):
            scheduler.step()
