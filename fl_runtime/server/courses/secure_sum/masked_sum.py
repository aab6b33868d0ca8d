"""The sum of a round's masked updates: add them, have the sites remove the masks, and make the next global model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_runtime.errors import RoundFailedError
from fl_runtime.secure_sum.context import context_of
from fl_runtime.secure_sum.vectors import in_all
from fl_runtime.server.courses.secure_sum.ahead import SharesAhead
from fl_runtime.server.courses.secure_sum.contents import MaskedContent
from fl_runtime.server.courses.secure_sum.steps import Steps
from fl_runtime.server.courses.sums.failures import SumFailedError
from fl_runtime.server.courses.sums.summing import Summing
from fl_runtime.server.membership import Membership
from fl_runtime.server.models import Model
from fl_runtime.server.state import Accepted, OpenRound, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.types import Array, Arrays, Update

_FIRST_ASKED_S = 1.0
"""How long the sites that are asked for shares first have, before all others are asked too."""


class MaskedSum:
    """Closes a round with a secure sum. A `RoundSum`.

    Attributes:
        current: The round.
        steps: What its sites are asked for.
        base: The global model of the round.
        strategy_state: Tensors that the strategy keeps at the server beside the next model, or None.
    """

    strategy_state: Blob | None = None

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        current: OpenRound,
        content: MaskedContent,
        ahead: SharesAhead | None = None,
    ) -> None:
        """Begin the sum of a round.

        Args:
            state: The run's state.
            membership: Its sites.
            current: The round.
            content: What the updates hold.
            ahead: Shares for this round that came with the updates of the round before, or None.
        """
        self.current = current
        self.steps = Steps(state, membership, current, context_of(state.settings.name, state.settings.filters), ahead)
        self.base: Model | None = state.models.newest
        self._state, self._membership, self._content = state, membership, content
        self._closing = Summing(state, membership.quorum, current)
        self._added = set[str]()
        self._totals: dict[str, Array] = {}  # of all names that any vector has

    def next_in_order(self) -> Accepted | None:
        """Go on with the steps before the sites train, and return a masked update that is not in the sum yet, if any.

        The order does not matter, since sums of whole numbers are exact.
        """
        self.steps.advance()
        return next((item for name, item in self.current.accepted.items() if name not in self._added), None)

    def add(self, accepted: Accepted) -> None:
        """Add a masked update to the totals."""
        self._added.add(accepted.update.site)
        for name, vector in accepted.update.arrays.items():
            ring, total = self._content.ring_of(name, accepted.update), self._totals.get(name)
            if ring is None:
                continue
            if total is None:
                self._totals[name] = np.array(vector)
            elif total.shape == vector.shape:  # else `check` names the site, when all updates are there
                ring.add_into(total, vector)

    def to_blame(self, failure: SumFailedError) -> Sequence[str]:
        """Return nobody: single updates are not known."""
        return ()

    def give_up(self) -> None:
        self._closing.give_up()

    def finish(self) -> Blob:
        """Have the survivors reveal what removes the masks, and make the next global model of the mean.

        Raises:
            RoundFailedError: Too few sites are left to remove the masks, or the totals make no sense.
            StateMismatchError: The updates do not fit each other.
        """
        order = [name for name in self._state.settings.sites if name in self.current.accepted]
        assert set(order) == self._added
        updates = [self.current.accepted[name].update for name in order]
        self._content.check(updates)
        rejoin_s = self._state.settings.rejoin_s
        with self._state.lock:
            self.steps.ask_survivors(order)
            if self.steps.step == "agree":
                self._wait(rejoin_s)
            self.steps.ask_shares()
            if not self._wait(min(_FIRST_ASKED_S, rejoin_s)):
                self.steps.ask_all_for_shares()
                self._wait(rejoin_s)
            if not self.steps.enough:
                raise RoundFailedError(
                    f"the masks of round {self.current.round} cannot be removed: too few sites have answered",
                    where=self._membership.reasons(),
                    fix="look at the logs of the sites that left",
                )
        blob = self._closing.finish_with(*self._content.plain(updates, self._unmasked(updates)))
        self.strategy_state = self._closing.strategy_state
        return blob

    def _wait(self, timeout_s: float) -> bool:
        """Wait until every survivor has answered, or the masks can be removed. False if it takes too long."""
        return self._membership.wait_until(
            lambda: self.steps.all_answered() or (self.steps.step == "reveal" and self.steps.enough), timeout_s
        )

    def _unmasked(self, updates: Sequence[Update]) -> Arrays:
        """Remove the masks from the totals of what every update has."""
        totals = {name: self._totals[name] for name in in_all([u.arrays for u in updates]) if name in self._totals}
        rings = {name: self._content.ring_of(name, updates[0]) for name in totals}
        for ring in dict.fromkeys(rings.values()):
            assert ring is not None
            self.steps.sums.unmask({name: total for name, total in totals.items() if rings[name] == ring}, ring)
        return totals
