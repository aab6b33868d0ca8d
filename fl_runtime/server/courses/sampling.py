"""Which sites take part in a round, and the round as it is opened with them."""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.filters.calibration import draw_order
from fl_runtime.server.state import OpenRound
from fl_runtime.types import RoundPlan, RunSettings, Strategy


def choose_participants(settings: RunSettings, strategy: Strategy, round: int, present: Sequence[str]) -> list[str]:
    """The participants of a round among the sites that are present. All of them contribute to an initial model."""
    if round == 0:
        return list(present)
    if settings.fraction < 1:
        return sample_sites(settings, round, present)
    chosen = strategy.plan_round(round, present).sites
    return [name for name in present if chosen is None or name in chosen]


def open_round(
    settings: RunSettings, strategy: Strategy, round: int, participants: Sequence[str], stage: str, now: float
) -> OpenRound:
    """The round with these participants, the same after a restart of the server. It begins `now`."""
    config = dict(strategy.configure(round, participants))
    plan = strategy.plan_round(round, participants) if round else RoundPlan()
    chosen = round > 0 and (settings.fraction < 1 or plan.sites is not None)
    if chosen:
        config["drawn"] = True  # so that a site that waits is not taken for one that comes back late
    return OpenRound(round, list(participants), config, now, stage, drawn=chosen, answers=plan.answers)


def sample_sites(settings: RunSettings, round: int, present: Sequence[str]) -> list[str]:
    """A random sample of the present sites, in the job's order.

    All sites of the job are shuffled by its seed (0 if it has none) and the round; the first ones that are present are
    the sample. So the result depends on the arguments alone, and a site that is away does not reorder the others.
    """
    order = draw_order(settings.seed, round, len(settings.sites))
    able = [settings.sites[index] for index in order if settings.sites[index] in present]
    chosen = set(able[: settings.sites_per_round])
    return [name for name in settings.sites if name in chosen]
