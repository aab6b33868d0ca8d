"""What strategies for plain weights have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fl_runtime.aggregation.spec import Described
from fl_runtime.capabilities import WEIGHTS
from fl_runtime.types import Arrays, Content, Settings, Update

_STATISTIC = re.compile(r"(^|[./])(running_mean|running_var|moving_mean|moving_variance)$")


def is_statistic(name: str) -> bool:
    """Whether a tensor holds running statistics of a normalisation layer, which are averaged and nothing else: an
    extrapolated variance could be below zero."""
    return _STATISTIC.search(name) is not None


@dataclass(frozen=True)
class WeightsStrategy(Described):
    """A strategy whose updates hold weights, and that says nothing to the sites. Subclasses add `aggregator`.

    weighted: a site's weight makes a difference.
    """

    content: ClassVar[Content] = "weights"
    initial: ClassVar[Literal["first", "all"]] = "first"
    weighted: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS})

    @property
    def linear(self) -> bool:
        """Whether the weighted mean of the updates is all that it needs of them, so that somebody else may form it."""
        return False

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Nothing: the sites train as they always do."""
        return {}

    def check(self, update: Update) -> None:
        """Every update that fits the model is taken."""

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """None: the model is a plain file of tensors."""
        return None
