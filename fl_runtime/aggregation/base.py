"""The base class of strategies for plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fl_runtime.aggregation.spec import Described
from fl_runtime.capabilities import WEIGHTS
from fl_runtime.types import Arrays, Content, Settings, Update


@dataclass(frozen=True)
class WeightsStrategy(Described):
    """Base of strategies whose updates hold weights. A subclass adds `name` and `aggregator`.

    Attributes:
        content: What updates hold, see `Strategy`.
        initial: Whose weights the initial model is made of, see `Strategy`.
        weighted: Whether `site_weights` of the job have an effect.
        requires: Capabilities that every site's adapter must have.
    """

    content: ClassVar[Content] = "weights"
    initial: ClassVar[Literal["first", "all", "none"]] = "first"
    weighted: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS})

    @property
    def linear(self) -> bool:
        """Whether the strategy needs only the weighted mean of the updates, so that a filter may compute it."""
        return False

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return no settings: local training is not changed."""
        return {}

    def check(self, update: Update) -> None:
        """Accept every update that fits the model."""

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """Return None: the model is stored as a plain tensor file."""
        return None
