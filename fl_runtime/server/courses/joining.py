"""The handshake: all sites register and agree, and the run gets its course."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fl_runtime.aggregation.shares import check_max_share
from fl_runtime.errors import ConfigError, FederationError, HandshakeError, PermissionDeniedError
from fl_runtime.server.courses.base import Course, Offer, Status, Upload
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.initial import check_initial_source
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import (
    Member,
    Registration,
    check_agreement,
    check_capabilities,
    differing_names,
    needed_capabilities,
    spokesman,
)
from fl_runtime.server.state import RunState
from fl_runtime.server.update_checks import TensorChecks
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import MOST_ROUNDS
from fl_runtime.wire.names import Excerpt

_ANSWER_S = 20.0
"""Time for sites to answer questions about lists of names that differ. The run fails then in any case."""
_LISTS_ASKED = 4


class Joining:
    """The course of a run whose sites have not agreed yet. It ends by driving the course that they agreed on."""

    def __init__(
        self, state: RunState, membership: Membership, cross_site: CrossEvaluation, agreed: Callable[[], Course]
    ) -> None:
        """Compose the course.

        Args:
            state: The run's state.
            membership: Its sites.
            cross_site: Checks whether the sites can do a cross-site evaluation, if the job wants one.
            agreed: Called under the lock once the sites have agreed; returns the course that the run has from then on.
        """
        self._state, self._membership, self._cross_site, self._agreed = state, membership, cross_site, agreed
        self.checks = TensorChecks(state, membership)

    def offer(self, member: Member, done: str) -> Offer | None:
        return None

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        return "late" if round else "duplicate"

    def accept(self, upload: Upload) -> Status:
        """Never called, since no update is admitted."""
        raise NotImplementedError

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        """Do nothing: no tasks are sent yet."""

    def drive(self) -> None:
        self.handshake().drive()

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return set()

    def handshake(self) -> Course:
        """Wait until all sites that are not gone have registered, and compare what they registered.

        Returns:
            The course that they agreed on.

        Raises:
            QuorumError: Too few sites are left, or have registered before the deadline.
            HandshakeError: They do not agree, too many adapters lack a capability that the job needs, or the script of
                a site has ended after fewer trainings.
            StateMismatchError: Their models differ.
            ConfigError: The job's settings do not fit what the sites registered.
        """
        state, membership = self._state, self._membership
        with state.lock:
            self._wait_for_sites()
            registrations = self._agreeing(
                {m.name: m.registration for m in membership.members.values() if m.active and m.registration}
            )
            state.agree(registrations[spokesman(registrations)].terms)
            self._check_settings()
            registrations = self._able(registrations)
            first = registrations[spokesman(registrations)]
            state.agree(first.terms)  # the spokesman, who names the best metric, may have been a site that left
            rounds = state.settings.rounds or max(r.rounds for r in registrations.values())
            if state.plan.strategy.open_ended:
                rounds = MOST_ROUNDS
            if not rounds:
                raise ConfigError(
                    "the number of rounds is not specified: neither the job nor the training loop has a budget",
                    fix="give --rounds R or Job(rounds=R)",
                )
            state.begin(rounds, list(registrations), state.layouts[first.layout])
            course = self._agreed()
            state.enter("initial")
            return course

    def _wait_for_sites(self) -> None:
        """Wait until all sites have registered, or a quorum of them has and the others have had `join_s` to follow.

        Without a quorum, the wait ends with a QuorumError at `deadline_s`, but not before the run's patience does.
        """
        membership, settings = self._membership, self._state.settings
        clock, outages = membership.clock, membership.outages
        began = clock.now()

        def enough() -> bool:
            return len(membership.present()) >= outages.needed

        while True:
            left_s = began + settings.deadline_s - clock.now()
            if not membership.wait_until(
                lambda: self._all_registered() or enough(), max(left_s, outages.patience_left_s)
            ):
                membership.check_quorum(membership.present(), "at the deadline of the handshake")
                continue
            join_s = began + settings.deadline_s - clock.now() if settings.join_s is None else settings.join_s
            if not membership.wait_until(lambda: self._all_registered() or not enough(), join_s):
                break
            if self._all_registered():
                return
        late = [m.name for m in membership.members.values() if not m.gone and not m.active]
        text = f"the run begins without {', '.join(late)}, which may still join it"
        self._state.events.emit("warning", text=text)

    def _agreeing(self, registrations: dict[str, Registration]) -> dict[str, Registration]:
        """Return the registrations that fit together: all of them, or those of a majority that makes a quorum.

        The other sites are expelled, each with the error that says how it differs. Raises HandshakeError for all sites
        if there is no such majority.
        """
        while True:
            excerpts = self._ask_about_names(registrations)
            error = self._disagreement(registrations, excerpts)
            if error is None:
                return registrations
            fitting = self._majority(registrations)
            if len(fitting) < self._state.settings.min_sites or len(fitting) == len(registrations):
                raise error  # the latter if each fits to one site, but not to each other
            base = spokesman(fitting)
            for name in registrations.keys() - fitting.keys():
                pair = {base: fitting[base], name: registrations[name]}
                self._membership.expel(name, self._disagreement(pair, excerpts) or error)
            registrations = fitting

    def _able(self, registrations: dict[str, Registration]) -> dict[str, Registration]:
        """Return the registrations of the sites that can do what the job needs, and whose policies it can keep to, if
        they make a quorum.

        The other sites are expelled, each with the error that says why. Raises that of the first one for
        all sites if too few are left.
        """
        plan, lacking = self._state.plan, dict[str, FederationError]()
        needs = needed_capabilities(self._state.settings, plan.strategy, plan.terms)
        for name, registration in registrations.items():
            try:
                check_capabilities({name: registration}, needs)
                self._membership.quorum.check_shown(name, registration.rules)
            except (HandshakeError, PermissionDeniedError) as error:
                lacking[name] = error
        able = {name: registration for name, registration in registrations.items() if name not in lacking}
        most, quorum = self._state.settings.sites_per_round, self._membership.quorum
        while unmet := quorum.unmet(list(able), "this run", of=min(len(able), most)):
            lacking |= unmet
            able = {name: registration for name, registration in able.items() if name not in lacking}
        if lacking and len(able) < max(self._state.settings.min_sites, 1):
            raise next(iter(lacking.values()))
        check_initial_source(self._state, quorum, able)
        for name, reason in lacking.items():
            self._membership.expel(name, reason)
        return able

    def _majority(self, registrations: dict[str, Registration]) -> dict[str, Registration]:
        """The registrations that fit to one of them, if they are more than half; else none."""
        compared: set[str] = set()
        for base, first in registrations.items():
            if base in compared:
                continue
            fitting = {
                name: other
                for name, other in registrations.items()
                if name == base or self._disagreement({base: first, name: other}, {}) is None
            }
            if 2 * len(fitting) > len(registrations):
                return fitting
            compared |= fitting.keys()
        return {}

    def _disagreement(
        self, registrations: Mapping[str, Registration], excerpts: Mapping[str, Mapping[str, Excerpt]]
    ) -> HandshakeError | None:
        try:
            check_agreement(registrations, self._state.layouts, self._state.plan.strategy, excerpts=excerpts)
        except HandshakeError as error:
            return error
        return None

    def _ask_about_names(self, registrations: Mapping[str, Registration]) -> dict[str, dict[str, Excerpt]]:
        """Ask two sites whose lists of names differ for the first entries that do, so that the error can show them."""
        pair, lists = next(iter(differing_names(registrations).items()), (None, []))
        if pair is None:
            return {}
        left, right = (registrations[site].names for site in pair)
        questions = {
            name: where
            for name in lists[:_LISTS_ASKED]
            if not (left[name].tells_entries and right[name].tells_entries)
            and not (left[name].from_data or right[name].from_data)
            and (where := left[name].first_difference(right[name])) is not None
        }
        return self._membership.ask(dict.fromkeys(pair, questions), _ANSWER_S) if questions else {}

    def _all_registered(self) -> bool:
        members = self._membership.members.values()
        over = next((m for m in members if m.script == "ended" and not m.attempt), None)
        if over is not None:
            raise HandshakeError(
                f"the sites' scripts train a different number of times: {over.name}: {over.gone}",
                where=f"handshake of {self._state.settings.name}",
                fix="let every site's script train equally often",
            )
        complete = self._membership.check_quorum(self._membership.remaining(), "before round 1")
        return complete and all(m.active for m in members if not m.gone)

    def _check_settings(self) -> None:
        """Raise ConfigError if the job's settings do not fit the strategy that the sites have agreed on."""
        settings, strategy = self._state.settings, self._state.plan.strategy
        if settings.fraction < 1 and strategy.content == "encoded":
            raise ConfigError(
                f"the strategy {settings.strategy or self._state.plan.terms.strategy} needs all sites in every round",
                where="fraction",
                fix="leave fraction out of the job",
            )
        check_max_share(settings, strategy)
        self._cross_site.check_settings()
