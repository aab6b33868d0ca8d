"""What the sites tell each other before they count: who takes part, the labels, and the subgroups that may be told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fl_adapters.loop.federation import Federation, large_union, left_out
from fl_runtime.errors import ConfigError, HandshakeError, ProtocolError
from fl_runtime.text import parse_json

from .cells import pooled_groups
from .inputs import MOST_GROUPS, MOST_LABELS, OTHER, Codes, Numbers, Question, Rows
from .result import Absence

_WHERE = "evaluate"
_FACT_CHARS = 2000
_LABELS = "pass labels=[...] with all classes, in the order of the columns of scores"
_MOST_CHARS = 250


@dataclass(frozen=True)
class SiteRules:
    """What a site allows of an evaluation.

    Attributes:
        smallest_cell: Least number of rows behind any number of a subgroup.
        per_site: Whether others may see the scores on this site's rows alone.
        min_cohort: Least number of sites in scores that this site takes part in, itself included.
        refusal: Why the site takes no part, as the end of a sentence; "" if it does.
    """

    smallest_cell: int = 1
    per_site: bool = True
    min_cohort: int = 1
    refusal: str = ""


@dataclass(frozen=True)
class SiteCard:
    """What a site tells of itself.

    Attributes:
        index: Number of the site among those of the job.
        name: Its name.
        per_site: Whether its own scores may be shown.
        min_cohort: Least number of sites in scores that it takes part in.
        reason: Why it takes no part; "" if it does.
    """

    index: int
    name: str
    per_site: bool
    min_cohort: int
    reason: str


@dataclass(frozen=True)
class Segments:
    """The sets of rows that are scored: all, each subgroup, and each site that allows it.

    Attributes:
        groups: Column and value of each subgroup, in order.
        sites: Cards of the sites with scores of their own.
    """

    groups: tuple[tuple[str, str], ...]
    sites: tuple[SiteCard, ...]

    def __len__(self) -> int:
        return 1 + len(self.groups) + len(self.sites)

    def own_rows(self, rows: Rows, pooled: Mapping[str, frozenset[str]], site: str) -> list[Codes]:
        """Return which of this site's rows are in each segment.

        Args:
            rows: This site's rows; none if it stays out.
            pooled: Column -> subgroups that this site puts together.
            site: Name of this site.
        """
        everything = np.arange(len(rows))
        nothing = everything[:0]
        found = [everything]
        for column, value in self.groups:
            texts = rows.groups[column]
            together = list(pooled[column])
            inside = (
                np.isin(texts, [*together, OTHER]) if value == OTHER else (texts == value) & (value not in together)
            )
            found.append(np.flatnonzero(inside))
        return [*found, *(everything if card.name == site else nothing for card in self.sites)]


def agree(federation: Federation, rows: Rows, rules: SiteRules, question: Question) -> tuple[list[SiteCard], list[str]]:
    """Agree with the other sites on the question, the labels, and who takes part.

    Args:
        federation: The federation.
        rows: This site's rows.
        rules: What this site allows.
        question: What is asked.

    Returns:
        The cards of all sites, in the order of the job, and the labels.

    Raises:
        HandshakeError: The sites ask for different things.
        ConfigError: No site takes part, or the labels do not fit the predictions.
    """
    site = federation.site
    reason = reason_to_stay_out(rows, rules)
    facts = {**question.facts(), **rows.facts()}
    own = [_packed("site", str(site.index), site.name, "1" if rules.per_site else "", str(rules.min_cohort), reason)]
    own += [_packed("fact", name, value) for name, value in facts.items()]
    if not reason and question.task == "classification" and question.labels is None:
        own += [_packed("label", label) for label in _own_labels(rows)]
    found = _unpacked(large_union(federation, own))
    _compare(facts, found, site.name)
    told = sorted((_card(entry) for entry in found if entry[0] == "site"), key=lambda card: card.index)
    cards = _large_enough(told)
    if all(card.reason for card in cards):
        reasons = "; ".join(f"{card.name}: {card.reason}" for card in cards)
        raise ConfigError(f"no site takes part: {reasons}", where=_WHERE, fix="see what each site asks for")
    labels = _labels(found, rows, question) if question.task == "classification" else []
    stays_out = any(card.reason for card in cards if card.index == site.index)
    if unknown := [label for label in _own_labels(rows) if label not in labels and labels and not stays_out]:
        raise ConfigError(f"this site has the label {unknown[0]!r}, which is not in labels", where=_WHERE, fix=_LABELS)
    return cards, labels


def agree_on_groups(
    federation: Federation, cells: Mapping[str, tuple[list[str], Numbers]], cards: list[SiteCard], least: int
) -> tuple[Segments, dict[str, frozenset[str]]]:
    """Agree on the subgroups. A site tells the names of those alone that are large enough there.

    Args:
        federation: The federation.
        cells: Column -> its values at this site, and the number of rows in each cell [values, cells].
        cards: The cards of all sites.
        least: Least number of rows in a cell that is not empty.

    Returns:
        The segments, and for each column the values that this site puts together.
    """
    pooled: dict[str, frozenset[str]] = {}
    own: list[str] = []
    for column, (values, counts) in cells.items():
        together = pooled_groups(counts, least) if len(values) else np.zeros(0, bool)
        pooled[column] = frozenset(value for value, hidden in zip(values, together, strict=True) if hidden)
        shown = {OTHER if value in pooled[column] else value for value in values}
        own += [_packed("group", column, value) for value in sorted(shown)]
    groups: list[tuple[str, str]] = []
    for entry in _unpacked(large_union(federation, own)):
        if entry[0] != "group" or len(entry) != 3 or entry[1] not in cells:
            raise ProtocolError("another site told something that is no subgroup", where=_WHERE)
        groups.append((entry[1], entry[2]))
    order = {column: number for number, column in enumerate(cells)}
    groups.sort(key=lambda group: (order[group[0]], group[1] == OTHER, _natural(group[1])))
    for column in cells:
        if sum(group[0] == column for group in groups) > MOST_GROUPS:
            raise ConfigError(
                f"the column {column!r} has more than {MOST_GROUPS} values over all sites",
                where=_WHERE,
                fix="put values together, such as ages into bands",
            )
    sites = tuple(card for card in cards if card.per_site and not card.reason)
    return Segments(tuple(groups), sites), pooled


def absences(cards: Iterable[SiteCard], count: int) -> tuple[Absence, ...]:
    """Return which sites of the job are not in the scores, and why."""
    known = {card.index: card for card in cards}
    out = []
    for index in range(count):
        if index not in known:
            out.append(Absence(f"site {index + 1} of {count}", "it was not in the run"))
        elif known[index].reason:
            out.append(Absence(known[index].name, known[index].reason))
    return tuple(out)


def reason_to_stay_out(rows: Rows, rules: SiteRules) -> str:
    """Return why a site takes no part, as the end of a sentence; "" if it does."""
    if rules.refusal:
        return rules.refusal
    if not len(rows):
        return "it has no rows"
    return f"it has fewer than {rules.smallest_cell} rows" if len(rows) < rules.smallest_cell else ""


def _own_labels(rows: Rows) -> list[str]:
    """The labels of this site's rows and of its predictions."""
    parts = [rows.truth, *(p.values for p in rows.predictions.values() if p.kind == "labels")]
    return sorted({str(label) for part in parts for label in set(part.tolist())})


def _labels(found: list[list[str]], rows: Rows, question: Question) -> list[str]:
    """Return all labels in order. Raises ConfigError if they do not fit the predictions or the rows of this site."""
    told = [entry[1] for entry in found if entry[0] == "label"]
    labels = list(question.labels) if question.labels is not None else sorted(told, key=_natural)
    if len(labels) > MOST_LABELS:
        raise ConfigError(f"the sites have {len(labels)} labels", where=_WHERE, fix=f"put some together: {MOST_LABELS}")
    for name, prediction in rows.predictions.items():
        wanted = {"score": 2, "scores": prediction.width}.get(prediction.kind, len(labels))
        if wanted != len(labels):
            raise ConfigError(
                f"the scores of {name!r} are for {wanted} classes, and the sites have {len(labels)}: "
                f"{', '.join(labels[:10])}",
                where=_WHERE,
                fix=_LABELS,
            )
    if question.positive is not None and (len(labels) != 2 or question.positive not in labels):
        raise ConfigError(
            f"positive={question.positive!r} is not one of two labels: {', '.join(labels[:10])}",
            where=_WHERE,
            fix=_LABELS,
        )
    return labels


def _compare(facts: Mapping[str, str], found: list[list[str]], site: str) -> None:
    """Check that all sites tell the same facts. Raises HandshakeError, which names the first that differs."""
    told: dict[str, list[str]] = {}
    for entry in found:
        if entry[0] == "fact" and len(entry) == 3:
            told.setdefault(entry[1], []).append(entry[2])
    for name in [*facts, *told]:
        others = [value for value in told.get(name, []) if value != facts.get(name)]
        if others:
            raise HandshakeError(
                f"the sites do not agree on {name}: {facts.get(name, 'nothing')} at {site}, {others[0]} elsewhere",
                where=_WHERE,
                fix="pass the same arguments, and predictions of the same models, at every site",
            )


def _natural(text: str) -> tuple[int, float, str]:
    """A key that sorts numbers by value, before texts."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _packed(*parts: str) -> str:
    """A fact as one text. A long one is shortened: it is compared, or read by people."""
    return json.dumps([part if len(part) <= _MOST_CHARS else f"{part[: _MOST_CHARS - 3]}..." for part in parts])


def _unpacked(texts: Iterable[str]) -> list[list[str]]:
    """Read facts of all sites. Raises ProtocolError for what is none."""
    found = []
    for text in sorted(texts):
        try:
            entry = parse_json(text, limit_chars=_FACT_CHARS)
        except ValueError:
            entry = None
        if not isinstance(entry, list) or not entry or not all(isinstance(p, str) and p.isprintable() for p in entry):
            raise ProtocolError("another site told something that is no fact about an evaluation", where=_WHERE)
        found.append(entry)
    return found


def _card(entry: list[str]) -> SiteCard:
    if len(entry) != 6 or not entry[1].isdecimal() or not entry[4].isdecimal():
        raise ProtocolError("another site told something that is no name of a site", where=_WHERE)
    return SiteCard(int(entry[1]), entry[2], bool(entry[3]), int(entry[4]), entry[5])


def _large_enough(cards: list[SiteCard]) -> list[SiteCard]:
    """Leave out sites that ask for more sites than take part, as long as there are any."""
    out = left_out({card.index: card.min_cohort for card in cards if not card.reason})
    return [replace(card, reason=card.reason or out.get(card.index, "")) for card in cards]
