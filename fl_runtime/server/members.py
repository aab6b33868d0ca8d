"""The sites of a run, as the server sees them: who has joined, what they registered, who is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fl_runtime.errors import HandshakeError, StateMismatchError
from fl_runtime.types import Strategy, Terms
from fl_runtime.wire.manifest import Manifest, differences

_SHOWN = 8
_FIXES = {
    "cross_site": "give that site validation data and leave evaluate_global on, or leave cross_site out of the job",
    "exact_restart": "leave exact_restart out of the job, or see docs/restart.md for what the script must add",
}


@dataclass(frozen=True)
class Registration:
    """What a site said at the handshake. `agreement` must be equal everywhere, `info` is only shown."""

    layout: bytes
    agreement: Mapping[str, str]
    info: Mapping[str, str]
    capabilities: frozenset[str]
    rounds: int
    evaluates: bool
    terms: Terms = field(default_factory=Terms)

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.hex(),
            "agreement": dict(self.agreement),
            "info": dict(self.info),
            "capabilities": sorted(self.capabilities),
            "rounds": self.rounds,
            "evaluates": self.evaluates,
            "terms": asdict(self.terms),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Registration:
        return cls(
            bytes.fromhex(fields["layout"]),
            fields["agreement"],
            fields["info"],
            frozenset(fields["capabilities"]),
            fields["rounds"],
            fields["evaluates"],
            Terms(**fields.get("terms", {})),
        )


@dataclass
class Member:
    """One site. Changed only under the run's lock.

    attempt: how many processes of this site have joined; older ones are fenced off. attending: open presence
    streams of this attempt. absent_since: monotonic seconds, None while present or before the first join. gone: why
    it no longer counts; it may come back. lost: it is gone because it was absent for too long, not of its own will.
    described: tensors in its manifests so far, of all attempts. known: one of them has registered.
    expelled: why this attempt may do nothing any more.
    """

    name: str
    index: int
    attempt: int = 0
    attending: int = 0
    absent_since: float | None = None
    gone: str = ""
    lost: bool = False
    registration: Registration | None = None
    layouts: set[bytes] = field(default_factory=set)
    described: int = 0
    known: bool = False
    expelled: str = ""

    @property
    def active(self) -> bool:
        return self.registration is not None and not self.gone


def check_agreement(
    registrations: Mapping[str, Registration], manifests: Mapping[bytes, Manifest], strategy: Strategy
) -> None:
    """All sites must exchange the same tensors and agree on what they declared; the first site is the measure.
    strategy: says what shapes may differ.

    Raises StateMismatchError or HandshakeError, naming sites, tensors and values.
    """
    names = list(registrations)
    first = registrations[names[0]]
    for name in names[1:]:
        other = registrations[name]
        declared = _declared_differences(first, other)
        tensors = differences(manifests[first.layout], manifests[other.layout], strategy.agreed_shape)
        if declared or tensors:
            raise _disagreement(names[0], name, declared, tensors)
    _check_rounds(registrations)


def check_latecomer(
    name: str,
    registration: Registration,
    members: Mapping[str, Member],
    manifests: Mapping[bytes, Manifest],
    strategy: Strategy,
) -> None:
    """check_agreement for a site that registers once the run has begun: with the first of the others."""
    others = {m.name: m.registration for m in members.values() if m.registration and m.name != name}
    if others:
        first = next(iter(others.items()))
        check_agreement(dict([first, (name, registration)]), manifests, strategy)


def check_capabilities(registrations: Mapping[str, Registration], what: str, requires: frozenset[str]) -> None:
    """Raises HandshakeError naming the first site whose adapter lacks what `what`, the job's strategy or a setting of
    it, needs."""
    for name, registration in registrations.items():
        weights = {"weights"} if registration.terms.content == "weights" else set()
        missing = requires - registration.capabilities - weights
        if missing:
            raise HandshakeError(
                f"{what} needs the capability {', '.join(sorted(missing))}, which the adapter of {name} does not have",
                where=f"handshake of {name}, before round 1",
                fix=_FIXES.get(what, "choose another strategy, or an adapter and version that support it"),
            )


def _declared_differences(first: Registration, other: Registration) -> list[str]:
    ours, theirs = ({**r.agreement, **asdict(r.terms)} for r in (first, other))
    return [
        f"{key}: {ours.get(key, 'missing')} != {theirs.get(key, 'missing')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _disagreement(first: str, other: str, declared: list[str], tensors: list[str]) -> HandshakeError:
    """What two sites do not have in common: settings first, since they are often the cause of the tensors."""
    shown = declared + tensors[:_SHOWN]
    if len(tensors) > _SHOWN:
        shown.append(f"... and {len(tensors) - _SHOWN} more tensors")
    count = f" in {len(tensors)} tensors" if tensors else ""
    kind = StateMismatchError if tensors else HandshakeError
    fix = "build the same model at every site, or leave what may differ at home with keep_local"
    return kind(
        f"{first} and {other} do not agree{count} ({first} != {other}):\n    " + "\n    ".join(shown),
        where=f"handshake of {first} and {other}, before round 1",
        fix=fix if tensors else "give both the same settings",
    )


def _check_rounds(registrations: Mapping[str, Registration]) -> None:
    """The budgets of the trainers, where the job does not say; one without a budget follows the others."""
    budgets = {name: r.rounds for name, r in registrations.items() if r.rounds}
    if len(set(budgets.values())) > 1:
        raise HandshakeError(
            "the sites' trainers are set for different numbers of rounds: "
            + ", ".join(f"{name}: {rounds}" for name, rounds in list(budgets.items())[:_SHOWN]),
            where="handshake, before round 1",
            fix="give all the same budget, or fix the number of rounds for all with --rounds or Job(rounds=)",
        )
