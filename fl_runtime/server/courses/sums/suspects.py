"""Sites whose updates make sums fail: each is told once, and excluded when it happens again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from fl_runtime.errors import SiteExcludedError
from fl_runtime.server.courses.sums.failures import SumFailedError
from fl_runtime.server.membership import Membership
from fl_runtime.server.state import RunState

log = logging.getLogger(__name__)


class Suspects:
    """What the run does about sites that are to blame for failed sums. Used under the run's lock.

    One failure may be an accident of training, so the site may train again. With the second one, in this round or a
    later one, the site is excluded for the rest of the run. The others go on if they make a quorum.
    """

    def __init__(self, state: RunState, membership: Membership) -> None:
        self._state, self._membership = state, membership

    def blame(self, sites: Iterable[str], round: int, failure: SumFailedError, *, certain: bool = False) -> None:
        """Warn of sites that are to blame for the first time, and exclude the others.

        The caller records the failure in the journal afterwards: a server that is killed in between sums again, and
        finds the same.

        Args:
            sites: The sites.
            round: The round that failed.
            failure: How it failed.
            certain: Whether the sites would send the same updates again, so that a second failure is not waited for.
        """
        earlier = self._state.journal.failures.suspects()
        for site in sites:
            if site in earlier or certain:
                self._exclude(site, [*earlier.get(site, []), round], failure)
                continue
            text = f"without the update of {site}, round {round} would not have failed; the next time, it is excluded"
            log.warning("%s", text)
            self._state.events.emit("warning", round, site, text=text)

    def _exclude(self, site: str, rounds: Sequence[int], failure: SumFailedError) -> None:
        first, *later = dict.fromkeys(rounds)
        times = f"rounds {first} and {later[0]}" if later else f"round {first}"
        error = SiteExcludedError(
            f"{site} is excluded from this run: {times} failed with its updates, and would have made a model without",
            where=failure.what,
            fix=f"look at the log of {site}: lower its learning rate or clip its gradients, or ask who runs it",
        )
        log.warning("%s", error)
        self._membership.expel(site, error)
