"""Workflows: who gets the model in which round. A run of rounds in which all sites train is only the simplest.

A workflow is a function from the number of a round to a `RoundPlan`. It keeps nothing between rounds and draws nothing
that the arguments do not decide, so a server that is killed asks again and goes on where it stood; every step is
journaled, and its result is the next global model, by the strategy's aggregator. `Workflow` gives the verbs:

    broadcast()            all sites that are there train on the global model, and the round waits for all of them
    broadcast(to)          only these sites; the others wait for a round of theirs
    broadcast(answers=k)   the round waits for k answers; what comes later is dropped, or with `late: carry` of the
                           job, counts in the next round
    send(site)             one site alone; what it sends back is the next global model
    relay(sites, round)    the model goes from site to site: each goes on with what the one before has sent

A strategy is a workflow (all of them derive from `Workflow`); one with a course of its own overrides `step`:

    @dataclass(frozen=True)
    class TwoHospitalsFirst(FedAvg):
        name: ClassVar[str] = "two-hospitals-first"

        def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
            return self.broadcast(present[:2]) if round <= 5 else self.broadcast()

After the last round, `scored_by` says which models a site evaluates, where the job wants that at all (`cross_site`).
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.types import RoundPlan


class Workflow:
    """Base of all strategies: the verbs, and the course of most runs."""

    @property
    def buffer(self) -> int | None:
        """None: rounds, for which `step` is asked. k: no site ever waits, and every k updates make the next model."""
        return None

    @property
    def relayed(self) -> bool:
        """Whether a site forms the sum of a round, and not the server."""
        return False

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """What happens in a round (1, 2, ...). present: the sites that are there, in the job's order."""
        return self.broadcast()

    def scored_by(self, site: str, models: Sequence[str]) -> Sequence[str]:
        """In a job with `cross_site`, after the last round: which of these models, the "global" one and those of the
        sites by their names, this site evaluates on its own data. By default all of them."""
        return models

    @staticmethod
    def broadcast(to: Sequence[str] | None = None, *, answers: int | None = None) -> RoundPlan:
        """The global model to these sites, None: to all that are there; the round waits for so many answers, None:
        for all."""
        return RoundPlan(None if to is None else tuple(to), answers)

    @staticmethod
    def send(site: str) -> RoundPlan:
        """The global model to one site."""
        return RoundPlan((site,))

    @classmethod
    def relay(cls, sites: Sequence[str], round: int) -> RoundPlan:
        """The round's place in laps from the first of these sites to the last, again and again."""
        return cls.send(sites[(round - 1) % len(sites)])
