"""The membership of a run: which sites have joined and registered, which are present, and which are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fl_runtime.errors import AbortedError, FederationError, ProtocolError, SiteExcludedError
from fl_runtime.server.calls import limits
from fl_runtime.server.outages import Outages
from fl_runtime.server.quorum import Quorum
from fl_runtime.server.registration import Member, Registration, check_latecomer, needed_capabilities
from fl_runtime.server.state import RunState
from fl_runtime.transport.waiting import Clock, duration_text
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.names import Excerpt, Question

_MOST_ATTEMPTS = 2**31
_ATTEMPTS_LOST = 1000  # after a backup was restored, so that no number of a process is given twice


class Membership:
    """The sites of one run.

    The methods that answer a site's call (`join`, `register`, `attend`, `mark_absent`, `mark_gone`, `expel`, `leave`)
    take the run's lock themselves; the others are called under it.

    Attributes:
        members: Every site of the job by name, in the job's order.
        clock: Measures absences and timeouts.
        outages: Whether enough sites are connected, and what the run waits for while they are not.
        quorum: What an aggregate of their updates must be made of.
        on_departure: Called under the lock with a member whose script has ended, or whose process is gone.
    """

    def __init__(self, state: RunState, clock: Clock) -> None:
        self._state, self.clock = state, clock
        self.on_departure: Callable[[Member], None] = _ignore
        self.quorum = Quorum(state)
        self.members = {name: Member(name, index) for index, name in enumerate(state.settings.sites)}
        self.outages = Outages(state, self.members, clock)

    # -- calls of sites --------------------------------------------------------------------------------------

    def join(self, name: str, version: str) -> Member:
        """Begin a new attempt of a site. Calls of its earlier attempts are refused from now on."""
        state = self._state
        with state.lock:
            state.raise_if_ended()
            member = self._named(name)
            if isinstance(member.refusal, SiteExcludedError):
                raise member.refusal
            member.attempt += _ATTEMPTS_LOST if state.journal.restored else 1
            member.gone, member.registration, member.refusal = "", None, None
            member.script = ""
            member.layouts.clear()
            member.questions.clear()
            member.excerpts.clear()
            member.attending, member.absent_since = 0, self.clock.now()
            state.journal.joined(name, member.attempt)
            state.journal.left(name, False)
            state.journal.lost(name, False)
            state.events.emit("joined", site=name, attempt=member.attempt, version=version)
            state.changed.notify_all()
            state.published.notify_all()  # wakes the previous attempt's waiting calls, which then end
            return member

    def register(
        self, name: str, attempt: int, manifest: Manifest, registration: Registration, beat_s: float | None
    ) -> Iterator[int | Question | None]:
        """Register a site, and wait until all sites have agreed.

        Yields:
            None every `beat_s` seconds of waiting, questions that must be passed to `answer` before the next step,
            then the run's number of rounds.
        """
        state = self._state
        with state.lock:
            member = self.caller(name, attempt)
            if state.plan.rounds is not None:
                layouts = {**state.layouts, manifest.layout: manifest}  # what does not fit is not kept
                needs = needed_capabilities(state.settings, state.plan.strategy, state.plan.terms)
                check_latecomer(name, registration, self.members, layouts, state.plan.strategy, needs)
                self.quorum.check_latecomer(name, registration.rules)
            self.add_manifest(member, manifest)
            member.layouts.add(manifest.layout)
            member.registration, member.known = registration, True
            self.quorum.rules[name] = registration.rules
            state.journal.registered(name, registration.to_json())
            state.events.emit(
                "registered",
                site=name,
                tensors=len(manifest.tensors),
                bytes=manifest.nbytes,
                evaluates=registration.evaluates,
                info=dict(registration.info),
            )
            state.changed.notify_all()
        while True:
            with state.lock:
                self.caller(name, attempt)
                if state.plan.rounds is None and not member.questions:
                    state.published.wait(beat_s)
                    self.caller(name, attempt)
                rounds, question = state.plan.rounds, next(iter(member.questions.items()), None)
            if rounds is not None:
                yield rounds
                return
            if question is not None:
                yield Question(*question)
            elif beat_s is not None:
                yield None

    def answer(self, name: str, attempt: int, list_name: str, excerpt: Excerpt) -> None:
        """Take a site's answer to a question about a list of names."""
        with self._state.lock:
            member = self.caller(name, attempt)
            if member.questions.pop(list_name, None) is not None:
                member.excerpts[list_name] = excerpt
            self._state.changed.notify_all()

    def ask(self, questions: Mapping[str, Mapping[str, range]], timeout_s: float) -> dict[str, dict[str, Excerpt]]:
        """Ask sites for entries of their lists of names, and wait for the answers under the lock.

        Args:
            questions: Site -> name of a list -> indices of the entries.
            timeout_s: How long to wait.

        Returns:
            The answers that have come: site -> name of a list -> entries.
        """
        members = [self.members[site] for site in questions]
        for member in members:
            member.questions.update(questions[member.name])
        self._state.published.notify_all()
        self.wait_until(lambda: not any(m.questions and m.active for m in members), timeout_s)
        for member in members:
            member.questions.clear()
        return {member.name: dict(member.excerpts) for member in members}

    def attend(self, name: str, attempt: int) -> Member:
        """Note that a site has opened a presence stream."""
        state = self._state
        with state.lock:
            member = self.caller(name, attempt)
            member.attending += 1
            member.absent_since = None
            if member.script == "lost":  # it was marked lost, but its process lives
                member.gone = member.script = ""
                state.journal.lost(name, False)
                state.events.emit("joined", site=name, attempt=attempt, version="")
                state.published.notify_all()
            state.changed.notify_all()
            return member

    def mark_absent(self, name: str, attempt: int) -> None:
        """Note that a presence stream has ended. The site has `rejoin_s` seconds to come back."""
        with self._state.lock:
            member = self.members[name]
            if attempt != member.attempt:
                return
            member.attending -= 1
            if member.attending == 0 and _expected(member):
                member.absent_since = self.clock.now()
                self._state.changed.notify_all()

    def mark_gone(self, name: str, reason: str, *, early: bool, stays: bool = False) -> None:
        """Stop counting on a site that has left, or whose process is known to be dead.

        Args:
            name: Name of the site.
            reason: Why it is gone.
            early: True if the run goes on without it.
            stays: True if its script goes on and may begin another training.
        """
        with self._state.lock:
            member = self.members[name]
            if not _expected(member):
                return
            if member.gone and not stays:
                self._state.events.emit("script_ended", site=name, early=early)
            elif not member.gone:
                member.gone = reason or "it left"
                goes_on = {"stays": True} if stays else {}
                self._state.events.emit("left", site=name, reason=member.gone, early=early, **goes_on)
            member.script = "resting" if stays else "" if early else "ended"
            if not stays:
                self.on_departure(member)
            self._state.changed.notify_all()

    def expel(self, name: str, error: FederationError) -> None:
        """Exclude a site that may not take part any more. Its calls under way, and later ones, get the error."""
        with self._state.lock:
            member = self.members.get(name)
            if member is None or self._state.phase in ("failed", "done"):
                return
            member.refusal = error
            member.registration, member.known = None, False  # it has no say in what the others have agreed on
            self._state.journal.left(name, True, refusal=error)
            self._state.journal.registered(name, None)
            self.mark_gone(name, error.what, early=True)
            self._state.published.notify_all()

    def leave(self, name: str, attempt: int, reason: str, *, early: bool, stays: bool = False) -> None:
        """Record that a site left on purpose, so that a restarted server does not wait for it."""
        with self._state.lock:
            self.caller(name, attempt)
            self._state.journal.left(name, True, stays=stays)
            self.mark_gone(name, reason, early=early, stays=stays)

    def caller(self, name: str, attempt: int, *, takes_part: bool = False) -> Member:
        """Return the member that makes this call, if it may. With `takes_part`, it must have registered and not left.

        Raises the run's error if it failed, the refusal of an expelled site, AbortedError for an older process of a
        restarted site, and ProtocolError for a site that does not take part.
        """
        self._state.raise_if_ended()
        member = self._named(name)
        if member.refusal is not None:
            raise member.refusal
        if attempt != member.attempt and not self._has_come_back(member, attempt):
            raise AbortedError(
                f"this process is attempt {attempt} of {name}; attempt {member.attempt} has taken over",
                where=name,
                fix="run one process per site; this one can be stopped",
            )
        left = member.gone != "" and member.script != "lost"  # a site that was given up may be there after all
        if takes_part and (member.registration is None or left):
            raise ProtocolError(
                f"{name} {'has left this run' if left else 'has not registered in this run'}",
                where=name,
                fix="join and register before anything is sent: the server compares the sites' models at the handshake",
            )
        return member

    def add_manifest(self, member: Member, manifest: Manifest) -> None:
        """Keep a manifest that a site has sent, within the site's limit."""
        if manifest.layout not in self._state.layouts:
            limits.check_described(member, manifest)
            self._state.add_layout(manifest)

    # -- who is there ----------------------------------------------------------------------------------------

    def present(self) -> list[str]:
        """Names of the sites that have registered and are not gone."""
        return [m.name for m in self.members.values() if m.active]

    def remaining(self) -> list[str]:
        """Names of the sites that are not gone, whether they have joined yet or not."""
        return [m.name for m in self.members.values() if not m.gone]

    def joined(self) -> list[str]:
        """Names of the sites that have joined and are not gone."""
        return [m.name for m in self.members.values() if m.attempt and not m.gone]

    def known(self) -> list[str]:
        """Names of the sites that have ever registered and are not gone, including those that are reconnecting."""
        return [m.name for m in self.members.values() if m.known and not m.gone]

    def initial_source(self) -> str | None:
        """The site whose own weights become the initial model: the first known one, in the job's order, whose policy
        allows it. None if there is none yet.

        It stays the source if it is restarted.
        """
        return next((name for name in self.known() if not self.quorum.keeps_initial(name)), None)

    def check_quorum(self, counted: Sequence[str], when: str) -> bool:
        """Check that `min_sites` sites are counted; see `Outages.check`.

        Returns:
            True if so. False if they are not, but the run waits for sites that would.

        Raises:
            QuorumError: They are not, and nobody is waited for any longer. It names the sites that are gone.
        """
        return self.outages.check(counted, when, self.reasons())

    def reasons(self) -> str:
        """Why each site that is gone is gone, as a human-readable message."""
        return "; ".join(f"{m.name}: {m.gone}" for m in self.members.values() if m.gone)

    # -- waiting ---------------------------------------------------------------------------------------------

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait under the lock until `ready()` is true. Sites that are absent for too long are marked gone meanwhile.

        Returns:
            True once `ready()` is true, False after `timeout_s` seconds, outages not counted (`Outages.left_s`).

        Raises:
            FederationError: The run failed, or the server was closed.
        """
        state, began = self._state, self.clock.now()
        while True:
            state.raise_if_ended(even_done=True)
            self._expire_absent()
            if ready():
                return True
            left_s = self.outages.left_s(began, timeout_s)
            if left_s <= 0:
                return False
            wakes_in_s = self.outages.wakes_in_s([m.absent_since for m in self._absent() if m.absent_since is not None])
            # wake a little later than that, so that the limit has passed
            self.clock.wait(state.changed, min(left_s, max(wakes_in_s, 0.0) + 0.01))

    def wait_for_quorum(self) -> None:
        """Wait until enough sites are present to open a round, or every site is present or gone: at most `rejoin_s`."""
        self.wait_until(lambda: self._assembled() or self._none_can_come(), self._state.settings.rejoin_s)

    def _assembled(self) -> bool:
        settings = self._state.settings
        present = self.present()
        enough = len(present) >= max(settings.min_sites, self.quorum.needed(present))
        # with exact_restart, wait for known sites: the draw must repeat
        returning = any(m.known and not m.gone and not m.active for m in self.members.values())
        return enough and not (settings.exact_restart and returning)

    def _none_can_come(self) -> bool:
        return not self.outages.waiting and all(m.active or m.gone for m in self.members.values())

    def _absent(self) -> list[Member]:
        return [m for m in self.members.values() if m.absent_since is not None and _expected(m)]

    def _expire_absent(self) -> None:
        """Mark those sites gone that the run does not wait for any longer."""
        self.outages.watch()
        for m in self._absent():
            if m.absent_since is not None and self.outages.gives_up(m.absent_since):
                absence = duration_text(self.clock.now() - m.absent_since)
                self.mark_gone(m.name, f"its connection was lost {absence} ago", early=True)
                m.script = "lost"
                self._state.journal.lost(m.name, True)

    def _has_come_back(self, member: Member, attempt: int) -> bool:
        """Take over a process that joined after the backup was made which this run was restored from."""
        if not member.attempt < attempt < _MOST_ATTEMPTS or not self._state.journal.restored:
            return False
        if not member.known:
            raise AbortedError(
                f"the server was restored from a backup that is older than the registration of {member.name}",
                where=member.name,
                fix="start the site's script again",
            )
        member.attempt = attempt
        self._state.journal.joined(member.name, attempt)
        self._state.events.emit("joined", site=member.name, attempt=attempt, version="")
        return True

    def _named(self, name: str) -> Member:
        member = self.members.get(name)
        if member is None:
            raise ProtocolError(f"{name} is not a site of this run", fix=f"its sites are {', '.join(self.members)}")
        return member


def _expected(member: Member) -> bool:
    """Whether the site's process should be there."""
    return member.script == "resting" or not member.gone


def _ignore(member: Member) -> None:
    """Stand in for `on_departure` until somebody listens."""
