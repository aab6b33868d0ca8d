"""Workflows: which sites train in which round.

A workflow maps the number of a round to a `RoundPlan`. It keeps no state and uses no randomness that its arguments do
not determine, so a killed server asks again and gets the same plan. `Workflow` offers functions that make plans:

    broadcast()            all connected sites train on the global model, and the round waits for all of them
    broadcast(to)          only these sites train; the others wait
    broadcast(answers=k)   the round waits for k updates; later ones are dropped, or count in the next round if the job
                           has `late: carry`
    send(site)             one site trains, and its update is the next global model
    relay(sites, round)    the sites take turns, each continuing with the model of the one before

Every strategy is a workflow. A strategy with a workflow of its own overrides `plan_round`:

    @dataclass(frozen=True)
    class TwoHospitalsFirst(FedAvg):
        name: ClassVar[str] = "two-hospitals-first"

        def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
            return self.broadcast(present[:2]) if round <= 5 else self.broadcast()

In a job with `cross_site`, `scored_by` chooses the models that a site evaluates after the last round.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.types import RoundPlan


class Workflow:
    """Base of all strategies: functions that make round plans, and the plan of most runs."""

    @property
    def buffer(self) -> int | None:
        """Number of updates that make a new global model in a run without rounds; None for a run with rounds."""
        return None

    @property
    def relayed(self) -> bool:
        """Whether a site, not the server, aggregates a round."""
        return False

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """Plan a round. It must return the same plan for the same arguments.

        Args:
            round: Number of the round, from 1.
            present: Names of the sites that are connected, in the job's order.

        Returns:
            The plan. By default, all sites train.
        """
        return self.broadcast()

    def scored_by(self, site: str, models: Sequence[str]) -> Sequence[str]:
        """Choose the models that a site evaluates on its data after the last round of a job with `cross_site`.

        Args:
            site: Name of the site.
            models: "global", and the names of the sites whose own models exist.

        Returns:
            Some of `models`; by default all of them.
        """
        return models

    @staticmethod
    def broadcast(to: Sequence[str] | None = None, *, answers: int | None = None) -> RoundPlan:
        """Plan a round in which several sites train on the global model.

        Args:
            to: Names of the sites; None for all that are connected.
            answers: Number of updates that the round waits for; None for all.

        Returns:
            The plan.
        """
        return RoundPlan(None if to is None else tuple(to), answers)

    @staticmethod
    def send(site: str) -> RoundPlan:
        """Plan a round in which one site trains.

        Args:
            site: Name of the site.

        Returns:
            The plan.
        """
        return RoundPlan((site,))

    @classmethod
    def relay(cls, sites: Sequence[str], round: int) -> RoundPlan:
        """Plan a round in which one site trains, in turn.

        Args:
            sites: Names of the sites in the order of their turns.
            round: Number of the round, from 1.

        Returns:
            The plan for the site whose turn it is.
        """
        return cls.send(sites[(round - 1) % len(sites)])
