"""What an aggregate of a run must be made of: how many updates, and no site's share above the cap."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fl_runtime.aggregation.shares import within_cap
from fl_runtime.server.state import RunState
from fl_runtime.types import Update

log = logging.getLogger(__name__)


class Quorum:
    """Holds the aggregates of one run to what the job asks of them."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._named: set[str] = set()  # sites whose share has been reported as scaled down

    def max_share(self, sites: Sequence[str]) -> float | None:
        """The largest share that one of these sites may have in their aggregate; None for no cap."""
        cap = self._state.settings.max_share
        return cap if cap is not None and cap < 1 else None

    @property
    def may_scale(self) -> bool:
        """Whether a cap may hold in this run, so that all weights must be known before the first update is summed."""
        return self.max_share(self._state.settings.sites) is not None

    def within_share(self, updates: Sequence[Update]) -> list[Update]:
        """Scale down the updates of an aggregate to the cap. A site that is scaled down is reported once.

        Raises RoundFailedError if so few updates cannot be within the cap.
        """
        cap = self.max_share([update.site for update in updates])
        if cap is None:
            return list(updates)
        equal = self._state.filters.counts_equally
        weights = [1.0] * len(updates) if equal else self._state.plan.strategy.weights_of(updates)
        limited, scaled = within_cap(updates, weights, cap)
        with self._state.lock:
            new = [site for site in scaled if site not in self._named]
            self._named.update(new)
            for site in new:
                self._report(site, updates, weights, cap)
        return limited

    def _report(self, site: str, updates: Sequence[Update], weights: Sequence[float], cap: float) -> None:
        own = sum(weight for update, weight in zip(updates, weights, strict=True) if update.site == site)
        text = (
            f"{site} would have a share of {own / sum(weights):.3g} in the model of round {updates[0].round}; it is "
            f"scaled down to max_share={cap:g}, here and in later rounds"
        )
        log.warning("%s", text)
        self._state.events.emit("warning", updates[0].round, site, text=text)
