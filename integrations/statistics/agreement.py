"""What the sites tell each other before they add numbers: who takes part, and with which columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fl_adapters.loop.federation import Federation, large_union, left_out
from fl_runtime.errors import ConfigError, HandshakeError, ProtocolError, did_you_mean
from fl_runtime.text import parse_json
from fl_runtime.types import StatisticsRules

from .columns import Column, Kind, Table
from .protection import NO_SUCH_COLUMN, is_allowed, pooled_categories, reason_to_keep_back, reason_to_stay_out
from .question import Question
from .result import Absence

_WHERE = "describe"


@dataclass(frozen=True)
class Plan:
    """Who takes part in what. It is the same at every site.

    Attributes:
        sites: Names of the sites that take part, sorted.
        kinds: Column -> "numeric" or "categorical", in the order of the tables.
        members: Column -> names of the sites whose values are in it.
        shifts: Numeric column -> how many of the last bits of a value the sketch of some site leaves open.
        categories: Categorical column -> the texts that sites tell, sorted.
        absences: What sites do not take part in, and why.
        per_site: Names of the sites whose own statistics are in the result.
        noise: Site -> the epsilon of its noise.
    """

    sites: tuple[str, ...]
    kinds: Mapping[str, Kind]
    members: Mapping[str, tuple[str, ...]]
    shifts: Mapping[str, int]
    categories: Mapping[str, Sequence[str]]
    absences: tuple[Absence, ...]
    per_site: tuple[str, ...]
    noise: Mapping[str, float]

    def of_kind(self, kind: Kind) -> list[str]:
        """Return the names of the columns of a kind, in order."""
        return [name for name, found in self.kinds.items() if found == kind]

    def alone(self, site: str) -> Plan:
        """Return the part of one site."""
        kinds = {name: kind for name, kind in self.kinds.items() if site in self.members[name]}
        categories = {name: texts for name, texts in self.categories.items() if name in kinds}
        return Plan((site,), kinds, dict.fromkeys(kinds, (site,)), self.shifts, categories, (), (), {})


@dataclass
class _Told:
    """What the sites have told."""

    sites: dict[str, _SiteCard] = field(default_factory=dict)
    columns: dict[str, dict[str, _ColumnCard]] = field(default_factory=dict)  # column -> site -> card
    absences: dict[tuple[str, str], Absence] = field(default_factory=dict)  # by site and column


@dataclass(frozen=True)
class _SiteCard:
    site: str
    reason: str
    per_site: bool
    min_cohort: int
    epsilon: float


@dataclass(frozen=True)
class _ColumnCard:
    site: str
    name: str
    place: int
    kind: Kind
    shift: int


def agree(federation: Federation, table: Table, rules: StatisticsRules, question: Question) -> Plan:
    """Find out who takes part in what.

    Args:
        federation: The federation.
        table: This site's table.
        rules: What this site allows.
        question: The arguments of `describe`.

    Returns:
        The plan, the same at every site.

    Raises:
        HandshakeError: The sites ask different questions, or hold different kinds of values in a column.
        ConfigError: No site has one of the columns that `features` names.
    """
    own = federation.site.name
    told = _Told()
    stays_out = reason_to_stay_out(table, rules)
    card = _SiteCard(own, stays_out, rules.per_site, rules.min_cohort, rules.epsilon or 0.0)
    lines = [["site", *vars(card).values()], *(["argument", *fact] for fact in question.facts().items())]
    shown = {} if stays_out else _shown(table, rules)
    for place, (name, column) in enumerate(shown.items()):
        lines.append(["column", own, name, place, column.kind, column.sketch.shift])
    kept = {} if stays_out else _kept_back([*table.columns, *table.skipped], shown, table, rules)
    lines += [["absence", own, name, reason] for name, reason in kept.items() if is_allowed(name, rules)]
    _read(large_union(federation, [json.dumps(line) for line in lines]), told, question)
    members = _members(told)

    names = dict.fromkeys([*told.columns, *(question.features or ())])
    kept = {} if stays_out else _kept_back(names, shown, table, rules)
    more = [["absence", own, name, reason] for name, reason in kept.items()]
    for name in shown:
        if own in members.by_column[name] and _kind(told.columns[name]) == "categorical":
            more += [["category", name, text] for text in pooled_categories(shown[name], rules.smallest_count)[0]]
    categories = _read(large_union(federation, [json.dumps(line) for line in more]), told, question)
    _check_names(told, question, table)
    return _plan(told, members, categories)


def _shown(table: Table, rules: StatisticsRules) -> dict[str, Column]:
    return {n: c for n, c in table.columns.items() if not reason_to_keep_back(c, n, table, rules)}


def _kept_back(
    names: Iterable[str], shown: Mapping[str, Column], table: Table, rules: StatisticsRules
) -> dict[str, str]:
    """Return why the site keeps back each of the columns that it does not show."""
    return {n: reason_to_keep_back(table.columns.get(n), n, table, rules) for n in names if n not in shown}


def _read(lines: Iterable[str], told: _Told, question: Question) -> dict[str, list[str]]:
    """Take what the sites have told; return the categories by column."""
    arguments: dict[str, set[str]] = {}
    categories: dict[str, list[str]] = {}
    for line in sorted(lines):
        match _parsed(line):
            case ["site", str(site), str(reason), bool(per_site), int(cohort), int() | float() as epsilon]:
                if site in told.sites:
                    raise ProtocolError(f"two sites call themselves {site}", where=_WHERE, fix="see who sends what")
                told.sites[site] = _SiteCard(site, reason, per_site, cohort, float(epsilon))
            case ["argument", str(name), str(value)]:
                arguments.setdefault(name, set()).add(value)
            case ["column", str(site), str(name), int(place), "numeric" | "categorical" | "empty" as kind, int(shift)]:
                told.columns.setdefault(name, {})[site] = _ColumnCard(site, name, place, kind, min(max(shift, 0), 63))
            case ["absence", str(site), str(name), str(reason)]:
                told.absences[site, name] = Absence(site, name, reason)
            case ["category", str(name), str(text)]:
                categories.setdefault(name, []).append(text)
            case _:
                raise ProtocolError(f"a site sent {line!r}", where=_WHERE, fix="use the same version at every site")
    for name, values in arguments.items():
        if len(values) > 1:
            here = question.facts().get(name, "nothing")
            others = " and ".join(sorted(values - {here}))
            raise HandshakeError(
                f"the sites do not agree on {name}: {here} here, {others} at another site",
                where=_WHERE,
                fix="pass the same arguments at every site",
            )
    return categories


def _parsed(line: str) -> Any:
    try:
        found = parse_json(line, limit_chars=10_000, depth=2)
    except ValueError:
        return None
    texts = [part for part in found if isinstance(part, str)] if isinstance(found, list) else [""]
    numbers = [part for part in found if isinstance(part, float)] if isinstance(found, list) else []
    return found if all(map(str.isprintable, texts)) and all(map(math.isfinite, numbers)) else None


def _check_names(told: _Told, question: Question, table: Table) -> None:
    """Raise the error for a column that `features` names and no site has."""
    absent: dict[str, set[str]] = {}
    for absence in told.absences.values():
        absent.setdefault(absence.feature, set()).add(absence.reason)
    for name in question.features or ():
        if name not in told.columns and absent.get(name, set()) <= {NO_SUCH_COLUMN} and _takes_part(told):
            raise ConfigError(
                f"no site has a column {name!r}",
                where=_WHERE,
                fix=f"{did_you_mean(name, table.names)}name columns of the tables in features=",
            )


def _takes_part(told: _Told) -> bool:
    return any(not card.reason for card in told.sites.values())


def _kind(cards: Mapping[str, _ColumnCard]) -> Kind:
    """Return what a column holds, over all sites."""
    by_kind: dict[str, list[str]] = {}
    for site, card in sorted(cards.items()):
        by_kind.setdefault(card.kind, []).append(site)
    by_kind.pop("empty", None)
    if len(by_kind) > 1:
        name = next(iter(cards.values())).name
        raise HandshakeError(
            f"the column {name!r} holds numbers at {_listed(by_kind['numeric'])}, "
            f"and something else at {_listed(by_kind['categorical'])}",
            where=_WHERE,
            fix=f"read it with the same type everywhere, or pass categorical=[{name!r}]",
        )
    return "categorical" if "categorical" in by_kind else "numeric"


def _listed(sites: Sequence[str]) -> str:
    shown = list(sites[:3]) + ([f"{len(sites) - 3} more"] if len(sites) > 3 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


@dataclass(frozen=True)
class _Members:
    """Which sites take part, in all and in each column, and why others do not."""

    sites: tuple[str, ...]
    by_column: Mapping[str, tuple[str, ...]]
    absences: Sequence[Absence]


def _members(told: _Told) -> _Members:
    absences = [Absence(card.site, "", card.reason) for card in told.sites.values() if card.reason]
    sites, few = _enough([card for card in told.sites.values() if not card.reason])
    absences += [Absence(site, "", reason) for site, reason in few.items()]
    by_column = {}
    for name in sorted(told.columns, key=lambda name: (min(c.place for c in told.columns[name].values()), name)):
        by_column[name], few = _enough([told.sites[site] for site in told.columns[name] if site in sites])
        absences += [Absence(site, name, reason) for site, reason in few.items()]
    return _Members(sites, by_column, absences)


def _plan(told: _Told, members: _Members, categories: Mapping[str, Sequence[str]]) -> Plan:
    by_column = {name: sites for name, sites in members.by_column.items() if sites}
    kinds = {name: _kind(told.columns[name]) for name in by_column}
    absences = [*members.absences, *(absence for absence in told.absences.values() if absence.site in members.sites)]
    return Plan(
        members.sites,
        kinds,
        by_column,
        {name: max(told.columns[name][site].shift for site in sites) for name, sites in by_column.items()},
        {name: sorted(categories.get(name, ())) for name, kind in kinds.items() if kind == "categorical"},
        tuple(sorted(absences, key=lambda a: (a.feature, a.site))),
        tuple(site for site in members.sites if told.sites[site].per_site) if len(told.sites) > 1 else (),
        {site: told.sites[site].epsilon for site in members.sites if told.sites[site].epsilon > 0},
    )


def _enough(cards: Iterable[_SiteCard]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the sites that are enough for each of them, and why others stay out."""
    asked = {card.site: card.min_cohort for card in sorted(cards, key=lambda card: card.site)}
    out = left_out(asked)
    return tuple(site for site in asked if site not in out), out
