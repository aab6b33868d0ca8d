"""What a run has spent of privacy: epsilon by site or server and by round, with its delta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import Element

from fl_adapters.environments.report.charts import Line, line_chart, series_class, value_text
from fl_adapters.environments.report.document import Content, table, tag
from fl_adapters.participant.local_work.dp_sgd import DELTA_INFO, EPSILON_METRIC
from fl_runtime.filters.ledger import UNITS, Unit
from fl_runtime.text import printable

SERVER = "the server"
_ALL = "mean over sites"
_TRAINING = "DP-SGD"
_COSTLY = ("GaussianDP", "LaplaceMetrics", "SVTPrivacy")  # filters with a guarantee, whether they tell its sum or not
_CHANGES_METRICS = "LaplaceMetrics"
_OWNERS_DRAWN, _OWNERS_LISTED = 24, 200
_ACCOUNTANT = (
    "Epsilon is an upper bound, as the accountant of whoever adds the noise reports it: privacy loss distributions of "
    "the package dp-accounting; for Gaussian noise without sampling the closed form, which gives the same number. "
    "Epsilons in different rows do not add up."
)


@dataclass
class PrivacyCost:
    """What one mechanism has spent at one site or at the server.

    Attributes:
        mechanism: Name of the filter, or "DP-SGD".
        owner: Name of the site, or `SERVER`.
        unit: What the guarantee is about.
        delta: The delta of its epsilon; None if not told.
        epsilon: Epsilon spent up to each round; empty if not told.
        note: Why there is no epsilon, or what else counts in it; "" if there is nothing to add.
    """

    mechanism: str
    owner: str
    unit: Unit = "update"
    delta: float | None = None
    epsilon: dict[int, float] = field(default_factory=dict)
    note: str = ""


class PrivacyCosts:
    """Collects what a run has spent of privacy from its events."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], PrivacyCost] = {}
        self._at_sites: list[Mapping[str, Any]] = []  # the job's filters with a guarantee that run at its sites

    @property
    def found(self) -> list[PrivacyCost]:
        """What each mechanism has spent at each site, in the order of first use."""
        costs = list(self._found.values())
        told = {c.mechanism for c in costs if c.owner != _ALL and (c.epsilon or c.note.startswith(_CHANGES_METRICS))}
        return [cost for cost in costs if cost.owner != _ALL or cost.mechanism not in told]

    def registered(self, site: str, info: Mapping[str, Any]) -> None:
        """Take what a site tells at the handshake."""
        if DELTA_INFO in info:
            cost = self._of(_TRAINING, site, "record")
            cost.delta, cost.note = _positive(info[DELTA_INFO]), "the site does not tell it"

    def started(self, filters: Sequence[Mapping[str, Any]]) -> None:
        """Take the filters of the job."""
        self._at_sites = []
        for settings in filters:
            if settings.get("at") == "server_in" and settings.get("name") == "GaussianDP":
                self._of("GaussianDP", SERVER).note = "not recorded by this version of the server"
            elif settings.get("at", "site_out") == "site_out" and settings.get("name") in _COSTLY:
                self._at_sites.append(settings)

    def update(self, round: int, site: str, metrics: Mapping[str, Any], filters: Sequence[Mapping[str, Any]]) -> None:
        """Take what an update tells: of its filters, and of DP-SGD as a metric."""
        told = {settings.get("name") for settings in filters if not settings.get("site")}
        for asked in self._at_sites:
            if asked["name"] not in told:  # of a policy that keeps what ran, or of an earlier version
                cost = self._of(asked["name"], site)
                cost.delta = cost.delta or _positive(asked.get("delta"))
                cost.note = cost.note if cost.epsilon else "the site does not tell it"
        for settings in filters:
            if settings.get("name") in _COSTLY or "spent" in settings:
                name = printable(str(settings.get("name")), 100)
                cost = self._of(f"{name} (policy)" if settings.get("site") else name, site)
                cost.delta = _positive(settings.get("delta")) or cost.delta
                cost.note = "all jobs of the site count" if settings.get("site") else ""
                if not _spend(cost, round, settings.get("spent")) and not cost.epsilon:
                    cost.note = f"{name} does not add up its rounds; see the site's ledger"
        if EPSILON_METRIC in metrics:
            cost = self._of(_TRAINING, site, "record")
            if any(settings.get("name") == _CHANGES_METRICS for settings in filters):
                cost.note = f"{_CHANGES_METRICS} changes the site's number on its way"
            elif _spend(cost, round, metrics[EPSILON_METRIC]):
                cost.note = ""

    def round_finished(self, round: int, data: Mapping[str, Any]) -> None:
        """Take what the server tells of a round: its own cost, and the mean over the sites."""
        own = data.get("privacy")
        if isinstance(own, Mapping):
            cost = self._of(printable(str(own["filter"]), 100), SERVER)
            cost.delta, cost.note = _positive(own.get("delta")), ""
            _spend(cost, round, own.get("spent"))
        if EPSILON_METRIC in data["metrics"]:
            cost = self._of(_TRAINING, _ALL, "record")
            cost.note = "single sites keep theirs to themselves; some have spent more"
            _spend(cost, round, data["metrics"][EPSILON_METRIC])

    def _of(self, mechanism: str, owner: str, unit: Unit = "update") -> PrivacyCost:
        return self._found.setdefault((mechanism, owner), PrivacyCost(mechanism, owner, unit))


def privacy_parts(found: Sequence[PrivacyCost], sites: Sequence[str]) -> list[Element]:
    """Draw what a run has spent of privacy.

    Args:
        found: What each mechanism has spent at each site.
        sites: Names of all sites, in the order in which they are listed.

    Returns:
        An explanation, a table and a chart over the rounds; nothing if there are no costs.
    """
    if not found:
        return []
    mechanisms = list(dict.fromkeys(cost.mechanism for cost in found))
    places = {site: at for at, site in enumerate(sites)}
    costs = sorted(found, key=lambda c: (mechanisms.index(c.mechanism), places.get(c.owner, len(sites))))
    noted = any(cost.note for cost in costs)
    rows: list[list[Content]] = [
        [
            cost.mechanism,
            cost.owner,
            UNITS[cost.unit],
            *([tag("span", cost.note, class_="long")] if noted else []),
            str(len(cost.epsilon)) if cost.epsilon else "not known",
            value_text(max(cost.epsilon.values())) if cost.epsilon else "not known",
            f"{cost.delta:g}" if cost.delta is not None else "not known",
        ]
        for cost in costs[:_OWNERS_LISTED]
    ]
    columns = ["mechanism", "at", "protects", *(["note"] if noted else []), "rounds", "epsilon spent", "delta"]
    made = [tag("p", _ACCOUNTANT, class_="soft"), table(columns, rows, numbers_from=len(columns) - 3)]
    if len(costs) > _OWNERS_LISTED:
        made.append(tag("p", f"{len(costs) - _OWNERS_LISTED} more are in events.jsonl.", class_="soft"))
    grown = [cost for cost in costs if len(cost.epsilon) > 1]
    drawn = grown[:_OWNERS_DRAWN]
    lines = [
        Line(
            f"{cost.mechanism}, {cost.owner}", sorted((float(at), v) for at, v in cost.epsilon.items()), series_class(i)
        )
        for i, cost in enumerate(drawn)
    ]
    if lines:
        made.append(tag("div", line_chart("Epsilon spent", lines), class_="charts"))
    if len(grown) > len(drawn):
        made.append(tag("p", f"The chart has the first {len(drawn)} of {len(grown)} curves.", class_="soft"))
    return made


def _spend(cost: PrivacyCost, round: int, spent: Any) -> bool:
    """Add what was spent up to a round; returns whether it is a number."""
    value = _positive(spent)
    if value is None:
        return False
    cost.epsilon[round] = max(cost.epsilon.get(round, 0.0), value)
    return True


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
