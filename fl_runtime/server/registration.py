"""What sites register at the handshake, and the comparison of their registrations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fl_runtime.capabilities import CROSS_EVALUATION, EXACT_RESTART
from fl_runtime.errors import FederationError, HandshakeError, StateMismatchError
from fl_runtime.types import CohortRules, RunSettings, Strategy, Terms
from fl_runtime.wire.manifest import Manifest, differences
from fl_runtime.wire.names import TENSORS_OF, Excerpt, NamesDigest, describe_difference

_LISTED = 8
_BEST = ("best_metric", "best_mode")
_FIXES = {
    "cross_site": "give that site validation data and leave evaluate_global on, or leave cross_site out of the job",
    "exact_restart": "leave exact_restart out of the job, or see docs/restart.md for what the script must add",
}


@dataclass(frozen=True)
class Registration:
    """What one site registered at the handshake.

    Attributes:
        layout: Layout digest of the tensors that the site exchanges.
        agreement: Names and values that must be equal at all sites.
        info: Names and values for people to read.
        capabilities: Capabilities of the site's adapter.
        rounds: The trainer's own number of rounds, 0 without a budget.
        evaluates: True if the site will score each global model.
        terms: The script's terms; they too must be equal at all sites.
        names: Lists of names, such as labels, that must be equal at all sites that give them.
        rules: What the site's policy asks of every aggregate.
        version: The site's version of fl-adapters; "" if it has not said.
    """

    layout: bytes
    agreement: Mapping[str, str]
    info: Mapping[str, str]
    capabilities: frozenset[str]
    rounds: int
    evaluates: bool
    terms: Terms = field(default_factory=Terms)
    names: Mapping[str, NamesDigest] = field(default_factory=dict)
    rules: CohortRules = field(default_factory=CohortRules)
    version: str = ""

    def to_json(self) -> dict[str, Any]:
        """The registration as JSON values, for the journal."""
        return {
            "layout": self.layout.hex(),
            "agreement": dict(self.agreement),
            "info": dict(self.info),
            "capabilities": sorted(self.capabilities),
            "rounds": self.rounds,
            "evaluates": self.evaluates,
            "terms": asdict(self.terms),
            "names": {name: digest.to_json() for name, digest in self.names.items()},
            "rules": asdict(self.rules),
            "version": self.version,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Registration:
        """The registration that `to_json` was called on."""
        return cls(
            bytes.fromhex(fields["layout"]),
            fields["agreement"],
            fields["info"],
            frozenset(fields["capabilities"]),
            fields["rounds"],
            fields["evaluates"],
            Terms(**fields.get("terms", {})),
            {name: NamesDigest.from_json(digest) for name, digest in fields.get("names", {}).items()},
            _rules(fields.get("rules", {})),
            fields.get("version", ""),
        )


def _rules(fields: Mapping[str, Any]) -> CohortRules:
    return CohortRules(**{**fields, "stays": tuple(fields.get("stays", ()))})


@dataclass
class Member:
    """One site as the server sees it. Changed only under the run's lock.

    Attributes:
        name: Name of the site.
        index: Its place in the job's list of sites.
        attempt: How many processes of this site have joined. Only the last one is listened to.
        attending: Number of open presence streams of this attempt.
        absent_since: Since when no stream has been open, in monotonic seconds. None while the site is present, and
            before it has ever joined.
        gone: Why the site no longer counts, or "". It may come back.
        registration: What this attempt registered, or None before that.
        layouts: Layout digests that this attempt knows, so that their manifests need not be sent again.
        described: Number of tensors in the manifests that the site has sent, over all attempts.
        known: True if any attempt has registered.
        refusal: The error that every call of this attempt gets, if it may not take part any more.
        held: Version of the last model to train that this attempt has received, or None.
        questions: Lists of names of which the site is asked for the entries in a range, by the list's name.
        excerpts: Its answers, by the list's name.
        script: "resting" if the site has left, but its script goes on and may begin another training. "ended" once the
            script has ended normally. "lost" if the site was absent for too long. "" otherwise.
    """

    name: str
    index: int
    attempt: int = 0
    attending: int = 0
    absent_since: float | None = None
    gone: str = ""
    registration: Registration | None = None
    layouts: set[bytes] = field(default_factory=set)
    described: int = 0
    known: bool = False
    refusal: FederationError | None = None
    held: int | None = None
    questions: dict[str, range] = field(default_factory=dict)
    excerpts: dict[str, Excerpt] = field(default_factory=dict)
    script: Literal["", "resting", "ended", "lost"] = ""

    @property
    def active(self) -> bool:
        """Whether the site has registered and is not gone."""
        return self.registration is not None and not self.gone

    @property
    def standing(self) -> str:
        """Where the site stands, as a human-readable message."""
        if self.script == "resting":
            return "done; its script still runs"
        if self.gone:
            return f"gone: {self.gone}"
        if self.active:
            return "takes part"
        return "joined" if self.attempt else "awaited"


def agreed_layout(members: Mapping[str, Member]) -> bytes:
    """Layout digest of the tensors that sites have registered, or b"" before the first has. Called under the lock."""
    return next((m.registration.layout for m in members.values() if m.registration), b"")


def check_agreement(
    registrations: Mapping[str, Registration],
    layouts: Mapping[bytes, Manifest],
    strategy: Strategy,
    when: str = "before round 1",
    excerpts: Mapping[str, Mapping[str, Excerpt]] | None = None,
) -> None:
    """Check that all sites exchange the same tensors and agree on what they declared. Each is compared with the first.

    A list of names is compared with that of the first site that gives one.

    Args:
        registrations: Registrations by site.
        layouts: Manifests by layout digest.
        strategy: Says which shapes may differ between sites.
        when: When the sites are compared, for the error.
        excerpts: Entries of lists of names that sites were asked for, by site and list.

    Raises:
        StateMismatchError: The tensors differ; the message names sites and tensors.
        HandshakeError: Declared values, lists of names, terms or numbers of rounds differ.
    """
    name_of_first = spokesman(registrations)
    first = registrations[name_of_first]
    differing = differing_names(registrations)
    names = {
        pair: {name: _described(name, pair, registrations, excerpts or {}) for name in lists}
        for pair, lists in differing.items()
    }
    for name, other in registrations.items():
        detailed = {listed.removeprefix(TENSORS_OF) for listed in differing.get((name_of_first, name), ())}
        declared = _declared_differences(first, other, detailed)
        tensors = differences(layouts[first.layout], layouts[other.layout], strategy.agreed_shape)
        lines = names.pop((name_of_first, name), {})
        if declared or tensors or lines:
            raise _disagreement(name_of_first, name, declared, lines, tensors, when)
    for (name, other_name), lines in names.items():
        raise _disagreement(name, other_name, [], lines, [], when)
    _check_rounds(registrations, when)


def differing_names(registrations: Mapping[str, Registration]) -> dict[tuple[str, str], list[str]]:
    """Find lists of names that differ from those of the first site that gives them.

    Args:
        registrations: Registrations by site.

    Returns:
        (that site, another site) -> names of the lists.
    """
    first = spokesman(registrations)
    givers: dict[str, str] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for site in dict.fromkeys([first, *registrations]):
        for name, digest in registrations[site].names.items():
            giver = givers.setdefault(name, site)
            if digest.first_difference(registrations[giver].names[name]) is not None:
                found.setdefault((giver, site), []).append(name)
    return found


def spokesman(registrations: Mapping[str, Registration]) -> str:
    """Name of the site whose terms hold for all: the first one that scores global models, else the first."""
    return next((name for name, r in registrations.items() if r.evaluates), next(iter(registrations)))


def check_latecomer(
    name: str,
    registration: Registration,
    members: Mapping[str, Member],
    layouts: Mapping[bytes, Manifest],
    strategy: Strategy,
    needs: Mapping[str, frozenset[str]],
) -> None:
    """Check a site that registers after the run has begun: that it has the capabilities that the run needs, and fits
    the first other site, as `check_agreement` does."""
    check_capabilities({name: registration}, needs, "during the run")
    others = {m.name: m.registration for m in members.values() if m.registration and m.name != name}
    if others:
        first = next(iter(others.items()))
        check_agreement(dict([first, (name, registration)]), layouts, strategy, "during the run")


def needed_capabilities(settings: RunSettings, strategy: Strategy, terms: Terms) -> dict[str, frozenset[str]]:
    """Return the capabilities that every site of a run needs.

    Args:
        settings: The job's settings.
        strategy: The strategy of the run.
        terms: What the sites have agreed on; they name the strategy if the job does not.

    Returns:
        What needs them (the strategy, or the name of a setting) -> names of capabilities.
    """
    needs = {f"the strategy {settings.strategy or terms.strategy}": strategy.requires}
    if settings.cross_site:
        needs["cross_site"] = frozenset({CROSS_EVALUATION})
    if settings.exact_restart:
        needs["exact_restart"] = frozenset({EXACT_RESTART})
    return needs


def check_capabilities(
    registrations: Mapping[str, Registration], needs: Mapping[str, frozenset[str]], when: str = "before round 1"
) -> None:
    """Raise HandshakeError, which names the first such site, if a site's adapter lacks a capability.

    Args:
        registrations: Registrations by site.
        needs: What `needed_capabilities` returned.
        when: When the sites are checked, for the error.
    """
    for what, requires in needs.items():
        for name, registration in registrations.items():
            weights = {"weights"} if registration.terms.content == "weights" else set()
            missing = requires - registration.capabilities - weights
            if missing:
                raise HandshakeError(
                    f"{what} needs the capability {', '.join(sorted(missing))}, which the adapter of {name} does not "
                    "have",
                    where=f"handshake of {name}, {when}",
                    fix=_FIXES.get(what, "choose another strategy, or an adapter and version that support it"),
                )


def _declared_differences(first: Registration, other: Registration, detailed: Collection[str]) -> list[str]:
    """Lines for the texts that differ, but for those that a list tells in detail."""
    both_score = first.evaluates and other.evaluates  # a site without validation data has no say in the best metric
    left, right = ({**r.agreement, **asdict(r.terms)} for r in (first, other))
    return [
        f"{key}: {left.get(key, 'missing')} != {right.get(key, 'missing')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and (both_score or key not in _BEST) and key not in detailed
    ]


def _described(
    name: str,
    pair: tuple[str, str],
    registrations: Mapping[str, Registration],
    excerpts: Mapping[str, Mapping[str, Excerpt]],
) -> str:
    """How a list of names differs between two sites, in one line."""
    left, right = (registrations[site].names[name] for site in pair)
    mine, theirs = (excerpts.get(site, {}).get(name) for site in pair)
    return describe_difference(name, left, right, (mine, theirs) if mine and theirs else None)


def _disagreement(
    first: str, other: str, declared: list[str], names: Mapping[str, str], tensors: list[str], when: str
) -> HandshakeError:
    """The error for two sites that differ; `names` has a line for each list of names.

    Settings come first, since they often cause differences in tensors.
    """
    lines = [*declared, *names.values(), *tensors[:_LISTED]]
    if len(tensors) > _LISTED:
        lines.append(f"... and {len(tensors) - _LISTED} more tensors")
    count = f" in {len(tensors)} tensors" if tensors else ""
    kind = StateMismatchError if tensors else HandshakeError
    fixes = []
    if tensors:
        fixes.append("build the same model at every site, or leave what may differ at home with keep_local")
    elif declared:
        fixes.append("give both the same settings")
    if any(line.partition(":")[0] in _BEST for line in declared):
        fixes.append("--best-metric and --best-mode name the best metric for all sites")
    weights = [name for name in names if name.startswith(TENSORS_OF)]
    if weights:
        fixes.append(
            "load the same frozen weights at every site, by name and revision; where they are random, seed the script "
            "before it makes them"
        )
    if len(names) > len(weights):
        fixes.append("use the same names in the same order at every site; if the difference is meant, pass agree=False")
    return kind(
        f"{first} and {other} do not agree{count} ({first} != {other}):\n    " + "\n    ".join(lines),
        where=f"handshake of {first} and {other}, {when}",
        fix="; ".join(fixes),
    )


def _check_rounds(registrations: Mapping[str, Registration], when: str) -> None:
    """Raise HandshakeError if trainers have different budgets. A trainer without one follows the others."""
    budgets = {name: r.rounds for name, r in registrations.items() if r.rounds}
    if len(set(budgets.values())) > 1:
        raise HandshakeError(
            "the sites' trainers are set for different numbers of rounds: "
            + ", ".join(f"{name}: {rounds}" for name, rounds in list(budgets.items())[:_LISTED]),
            where=f"handshake, {when}",
            fix="give all the same budget, or fix the number of rounds for all with --rounds or Job(rounds=)",
        )
