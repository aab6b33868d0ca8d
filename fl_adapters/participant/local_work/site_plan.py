"""What the job's strategy requires of a site: the strategy's text, parsed once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.lora.products import LoraProducts
from fl_runtime.aggregation.lora.strategies import LoraAverage
from fl_runtime.capabilities import PERSONAL_MODEL
from fl_runtime.errors import ConfigError
from fl_runtime.types import Strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SitePlan:
    """What a site does beyond plain local training, because the job's strategy requires it.

    Attributes:
        strategy: The job's strategy. None if the job leaves it to the script, or if this version does not know it.
    """

    strategy: Strategy | None = None

    @classmethod
    def parse(cls, spec: str | None) -> SitePlan:
        """Return the plan for a strategy.

        A strategy of a later version, which this one does not know, gives the plan of plain training and a warning in
        the log. It may still work: the handshake compares what the strategy requires with what this site supports.

        Args:
            spec: The strategy as text, such as "ditto:lam=0.1"; None if the job leaves it to the script.

        Returns:
            The plan.
        """
        if spec is None:
            return cls()
        try:
            return cls(make_strategy(spec))
        except ConfigError as error:
            log.warning("this version of fl-adapters cannot read the strategy %r of the job: %s", spec, error.what)
            return cls()

    @property
    def spec(self) -> str | None:
        """The strategy as text, which `parse` reads."""
        return self.strategy.spec if self.strategy is not None else None

    @property
    def phases(self) -> int:
        """Number of times each round trains the local budget: 2 with a personal model (Ditto), else 1."""
        return 2 if self.strategy is not None and PERSONAL_MODEL in self.strategy.requires else 1

    @property
    def records_steps(self) -> bool:
        """Whether an update tells of every step of its round (SCAFFOLD), beside the trained weights."""
        return self.strategy is not None and LocalTerms.from_config(self.strategy.configure(1, ())).control_variates

    @property
    def relayed(self) -> bool:
        """Whether a site, not the server, aggregates each round (swarm)."""
        return self.strategy is not None and self.strategy.relayed

    @property
    def lora(self) -> LoraAverage | LoraProducts | None:
        """The strategy, if it is one for LoRA adapters."""
        return self.strategy if isinstance(self.strategy, LoraAverage | LoraProducts) else None
