"""The steps of one masked sum at the server: keys, shares, vectors, signatures, and what is revealed at the end.

Sites answer each step with a message that the server keeps in the journal before it acknowledges it, so that a server
which is killed within a round goes on where it stopped. The protocol itself is in `fl_runtime.secure_sum`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from fl_runtime.errors import ProtocolError, RoundFailedError
from fl_runtime.filters.server import applied_filters
from fl_runtime.secure_sum import Context, ServerSums
from fl_runtime.secure_sum.messages import KeysMessage
from fl_runtime.secure_sum.travelling import MaskedMark, as_message, as_text
from fl_runtime.server.courses.base import Offer
from fl_runtime.server.courses.secure_sum.ahead import SharesAhead, stage_after
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member
from fl_runtime.server.state import OpenRound, RunState
from fl_runtime.types import PARTICIPANTS, Settings

Step = Literal["keys", "shares", "vectors", "agree", "reveal"]

PREFIX = "sum-"
"""Start of the stages of steps. The stage of a site's vector is that of its round."""


def mark_of(encoding: str) -> MaskedMark | None:
    """Return the mark of a masked update; None if it is not masked. Raises ProtocolError if it cannot be read."""
    return MaskedMark.of(applied_filters(encoding))


class Steps:
    """One try at the masked sum of a round. Used under the run's lock.

    Attributes:
        stage: Names this try in tasks and answers.
        step: What the sites are asked for now.
    """

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        current: OpenRound,
        context: Context,
        ahead: SharesAhead | None = None,
    ) -> None:
        """Begin a try, or go on with the one that the journal knows.

        Args:
            state: The run's state.
            membership: Its sites.
            current: The round.
            context: What the masks of this run are bound to.
            ahead: Shares that came with the updates of the round before, or None. They spare the steps before training
                if the participants are the same processes.
        """
        self._state, self._membership, self._current, self._context = state, membership, current, context
        self.step: Step = "keys"
        self._began = membership.clock.now()
        self._keys = {name: _Key.read(body) for (_, name), body in state.journal.messages.read(0, "").items()}
        self._processes: dict[str, int] = {}  # site -> number of the process whose masks these are
        self._answers: dict[Step, dict[str, bytes]] = {step: {} for step in ("shares", "agree", "reveal")}
        self._survivors: tuple[str, ...] = ()
        self._asks_all = False  # for shares; False while those of the first sites may be enough
        self._sums: ServerSums | None = None
        noted = state.journal.messages.read(current.round, current.stage)
        self.stage = noted.get(("stage", "")) or f"{PREFIX}{current.round}-{secrets.token_hex(8)}"
        if noted:
            self._restore(noted)
            return
        state.journal.messages.forget_before(current.round)
        if ahead is None or not self._use(ahead):
            self._note("stage", "", self.stage)

    # -- what a site is asked for -----------------------------------------------------------------------------

    def offer(self, member: Member) -> Offer | None:
        """The step that a site can answer now, or None. A site that is due to train gets its task from the round."""
        name = member.name
        if self.step == "keys" and name in self._current.participants and not self._has_key(member):
            return self._task("keys", {})
        if name not in self._processes or self._processes[name] != member.attempt:
            return None
        if self.step not in ("shares", "agree", "reveal") or name in self._answers[self.step]:
            return None
        if self.step == "shares":
            return self._task("shares", {"keys": {site: as_text(self._keys[site].public) for site in self._processes}})
        if name not in self._survivors:
            return None
        if self.step == "agree":
            return self._task("agree", {"survivors": list(self._survivors)})
        if name not in self._asked_for_shares():
            return None
        return self._task("reveal", {"signatures": {s: as_text(m) for s, m in self.sums.signatures(name).items()}})

    def due(self, member: Member) -> Settings | None:
        """What a site needs to mask its update of this round; None if it is not in the sum, or it is too early."""
        if self.step != "vectors" or self._processes.get(member.name) != member.attempt or self._sums is None:
            return None
        received = {site: as_text(part) for site, part in self.sums.deliver(member.name).items()}
        return {"stage": self.stage, "received": received, "next": self._next_stage()}

    def _next_stage(self) -> str:
        """The stage for which shares are wanted with the updates; "" if the next round will not need them."""
        rounds, settings = self._state.plan.rounds, self._state.settings
        last = rounds is not None and self._current.round >= rounds
        return "" if last or settings.fraction < 1 else stage_after(self.stage, self._current.round)

    def takes_vector(self, site: str, attempt: int, mark: MaskedMark) -> bool:
        """Whether a masked update of this process is part of the sum. If so, its signature is kept."""
        if self.step != "vectors" or self._processes.get(site) != attempt or mark.stage != self.stage:
            return False
        self._take_signature(site, mark)
        return True

    def _take_signature(self, site: str, mark: MaskedMark) -> None:
        if mark.signature:
            with suppress(ProtocolError):  # the site is asked to sign the survivors, like those that sent no signature
                self.sums.add_signature_of_all(site, mark.signature)

    # -- what it answers ---------------------------------------------------------------------------------------

    def admits(self, site: str, attempt: int, stage: str) -> bool:
        """Whether an answer to the present step is wanted from this process."""
        member = self._membership.members[site]
        return stage == self.stage and member.attempt == attempt and self.offer(member) is not None

    def take(self, site: str, attempt: int, message: bytes) -> None:
        """Keep an answer that `admits` has let in, first in the journal.

        Args:
            site: Name of the site.
            attempt: Number of its process.
            message: The answer to the present step.

        Raises:
            ProtocolError: The message cannot be one of this step.
        """
        step = self.step
        if step == "keys":
            key = _Key(attempt, message)
            self._check_key(site, message)
            self._state.journal.messages.write(0, "", "keys", site, key.written())
            self._keys[site] = key
        elif step != "vectors":
            self._add(step, site, message)
            self._note(step, site, as_text(message))
        self.advance()
        self._state.changed.notify_all()

    # -- from step to step ------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Go on to the next step once the present one has its answers, or has waited long enough for them.

        Raises RoundFailedError if the process of a site has been replaced before its vector was there.
        """
        if self.step == "keys" and self._answered(lambda member: self._has_key(member)):
            self._fix_processes([n for n in self._current.participants if self._has_key(self._membership.members[n])])
        if self.step == "shares" and self._answered(lambda member: member.name in self._answers["shares"]):
            self._fix_cohort()
        if self.step == "vectors":
            self._check_replaced()

    def ask_survivors(self, sent: Sequence[str]) -> None:
        """Ask the sites whose vectors are there to agree on who they are, unless they have signed that already.

        Args:
            sent: Names of these sites.
        """
        self._survivors = self.sums.survivors(sent)
        self._go_to("reveal" if all(map(self.sums.may_reveal, self._survivors)) else "agree")

    def ask_shares(self) -> None:
        """Ask the survivors for the shares of the masks that are left in the sum, and no more of them than needed."""
        if self.step != "reveal":
            self._go_to("reveal")

    def ask_all_for_shares(self) -> None:
        """Ask every survivor for its shares, since one of those that were asked does not answer."""
        self._asks_all = True
        self._state.published.notify_all()

    def _asked_for_shares(self) -> Sequence[str]:
        """Those whose shares are enough: the first survivors that have answered or can. An answer costs all a call."""
        if self._asks_all:
            return self._survivors
        members, answered = self._membership.members, self._answers["reveal"]
        there = [n for n in self._survivors if n in answered or (members[n].active and self._same(members[n]))]
        return there[: self.sums.most_needed]

    def ahead(self) -> SharesAhead | None:
        """Return the shares for the next round, if the update of every site of this one has brought them."""
        accepted = self._current.accepted
        if self.step != "reveal" or set(accepted) != set(self._processes):
            return None
        marks = {name: mark_of(item.update.encoding) for name, item in accepted.items()}
        shares = {name: mark.shares for name, mark in marks.items() if mark is not None and mark.shares}
        if len(shares) < len(accepted):
            return None
        number = self._current.round
        return SharesAhead(number + 1, stage_after(self.stage, number), dict(self._processes), shares)

    def all_answered(self) -> bool:
        """Whether every survivor that is still there has answered the present step."""
        return self._answered(lambda member: member.name in self._answers[self.step])

    @property
    def enough(self) -> bool:
        """Whether the masks that are left can be removed."""
        return self._sums is not None and self._sums.enough

    @property
    def sums(self) -> ServerSums:
        """The server's side of the protocol."""
        assert self._sums is not None
        return self._sums

    def _answered(self, done: Callable[[Member], bool]) -> bool:
        names = self._current.participants if self.step == "keys" else list(self._survivors or self._processes)
        members = [self._membership.members[name] for name in names]
        waiting = [member for member in members if member.active and self._same(member) and not done(member)]
        patience_s = min(self._state.settings.rejoin_s, self._state.settings.deadline_s)
        return not waiting or self._membership.clock.now() > self._began + patience_s

    def _same(self, member: Member) -> bool:
        return self.step == "keys" or self._processes.get(member.name) == member.attempt

    def _check_key(self, site: str, message: bytes) -> None:
        """Refuse keys that cannot be read, or that another site has sent: they would end the round for all."""
        keys = KeysMessage.parse(site, message)
        for name, other in self._keys.items():
            known = KeysMessage.parse(name, other.public)
            if name != site and {keys.exchange, keys.signing} & {known.exchange, known.signing}:
                raise ProtocolError(f"{site} sends the keys of {name}", fix="every site makes keys of its own")

    def _has_key(self, member: Member) -> bool:
        key = self._keys.get(member.name)
        return key is not None and key.attempt == member.attempt

    def _use(self, ahead: SharesAhead) -> bool:
        """Begin with training, if the participants have sent their shares with the updates of the round before."""
        members = self._membership.members
        present = {name: members[name].attempt for name in self._current.participants}
        if ahead.round != self._current.round or present != ahead.processes:
            return False
        stage, self.stage, self._processes = self.stage, ahead.stage, dict(ahead.processes)
        self._make_sums()
        try:
            for name, message in ahead.shares.items():
                self._add("shares", name, message)
        except ProtocolError:  # the steps ask again, and leave out whoever cannot answer
            self.stage, self._processes, self._sums, self._answers["shares"] = stage, {}, None, {}
            return False
        with self._state.journal.messages.together():
            self._note("stage", "", self.stage)
            self._note("processes", "", json.dumps(self._processes))
            for name, message in ahead.shares.items():
                self._note("shares", name, as_text(message))
            self._fix_cohort()
        return True

    def _fix_processes(self, names: Sequence[str]) -> None:
        self._processes = {name: self._keys[name].attempt for name in names}
        self._make_sums()
        self._note("processes", "", json.dumps(self._processes))
        self._go_to("shares")

    def _make_sums(self) -> None:
        publics = {name: self._keys[name].public for name in self._processes}
        self._sums = ServerSums(self._context, self._current.round, self.stage, publics)

    def _fix_cohort(self) -> None:
        """Whoever has sent shares is in the sum; nobody else joins the round."""
        cohort = [name for name in self._processes if name in self._answers["shares"]]
        self._processes = {name: self._processes[name] for name in cohort}
        self._note("cohort", "", json.dumps(self._processes))
        self._close_round()
        self._go_to("vectors")

    def _close_round(self) -> None:
        self._current.participants[:] = list(self._processes)
        self._current.drawn = True

    def _check_replaced(self) -> None:
        for name, attempt in self._processes.items():
            member = self._membership.members[name]
            if member.active and member.attempt != attempt and name not in self._current.accepted:
                raise RoundFailedError(
                    f"{name} was started again after the masks of round {self._current.round} had been agreed, so the "
                    "round begins again with new ones"
                )

    def _go_to(self, step: Step) -> None:
        self.step, self._began = step, self._membership.clock.now()
        self._note("step", "", json.dumps([step, list(self._survivors)]))
        self._state.published.notify_all()

    def _add(self, step: Step, site: str, message: bytes) -> None:
        assert self._sums is not None
        if step == "shares":
            self._sums.add_shares(site, message)
        elif step == "agree":
            self._sums.add_signature(site, message)
        else:
            self._sums.add_reveal(site, message)
        self._answers[step][site] = message

    def _task(self, step: Step, settings: Mapping[str, object]) -> Offer:
        config = {"step": step, PARTICIPANTS: len(self._current.participants), **settings}
        return Offer("secure_sum", self._current.round, config, None, True, self.stage)

    def _note(self, step: str, site: str, body: str) -> None:
        self._state.journal.messages.write(self._current.round, self._current.stage, step, site, body)

    def _restore(self, noted: Mapping[tuple[str, str], str]) -> None:
        """Go on where a server that was killed had stopped."""
        if ("processes", "") not in noted:
            return
        self._processes = json.loads(noted["processes", ""])
        self._make_sums()
        answered: tuple[Step, ...] = ("shares", "agree", "reveal")
        self.step, survivors = json.loads(noted["step", ""])
        self._survivors = tuple(survivors)
        for step in answered:
            if step == "agree" and self._survivors:
                self._restore_signatures()
                self.sums.survivors(self._survivors)
            for (noted_step, site), body in noted.items():
                if noted_step == step:
                    self._add(step, site, as_message(body, "a message in the journal"))
        if ("cohort", "") in noted:
            self._processes = json.loads(noted["cohort", ""])
            self._close_round()

    def _restore_signatures(self) -> None:
        for site, accepted in self._current.accepted.items():
            mark = mark_of(accepted.update.encoding)
            if mark is not None and site in self.sums.cohort:
                self._take_signature(site, mark)


class _Key:
    """The public keys of one process of a site."""

    def __init__(self, attempt: int, public: bytes) -> None:
        self.attempt, self.public = attempt, public

    def written(self) -> str:
        return f"{self.attempt} {as_text(self.public)}"

    @classmethod
    def read(cls, body: str) -> _Key:
        attempt, _, text = body.partition(" ")
        return cls(int(attempt), as_message(text, "a key in the journal"))
