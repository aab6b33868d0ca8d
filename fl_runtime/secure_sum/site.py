"""A site's side of secure sums: its keys for a run, its shares, masks and signatures, and the rules that it keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fl_runtime.errors import PermissionDeniedError, ProtocolError
from fl_runtime.secure_sum.context import Context, Signer, SumRules, Verifier
from fl_runtime.secure_sum.masks import add_masks
from fl_runtime.secure_sum.messages import KeysMessage, RevealMessage, SharesMessage, checked_signature
from fl_runtime.secure_sum.primitives import RunKeys, check_available, expand, extract, new_seed, seal, unseal
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.secure_sum.roster import Roster, keys_statement, statement
from fl_runtime.secure_sum.shamir import SHARE_BYTES, split
from fl_runtime.secure_sum.signed_rounds import SignedRounds
from fl_runtime.types import Array

_MAX_STAGES = 1000
_ASK = "the server may be trying to learn more than sums: ask who runs it"


@dataclass
class _Stage:
    """What a site knows about one stage. `shares` are its shares of (b, K) by their owner."""

    roster: Roster
    seed: bytes
    pair_seeds: dict[str, bytes]
    shares: dict[str, tuple[int, int]]
    message: bytes
    cohort: frozenset[str] = frozenset()
    masked: set[str] = field(default_factory=set)
    signed_all: bool = False
    survivors: tuple[str, ...] = ()


class SiteSums:
    """A site's part in the secure sums of one run, for one process.

    The keys are made here and never leave the process. One that is started again makes new ones, under a higher
    attempt, so it can take part from the next stage on.

    Args:
        site: Name of this site.
        context: The run.
        rules: What this site demands of a sum.
        signer: Signs this site's keys with its certificate; None in a simulation.
        verifier: Verifies other sites' keys; with one, keys without a signature are refused. None in a simulation.
        record: What `keep` got last in an earlier process of this site in this run.
        keep: Writes what must outlive this process, so that the rules hold over restarts: JSON values, without any
            secret. It is called before a signature is returned, and must be on disk when it returns.
        attempt: Number of this process in the run. It must grow with every start.

    Attributes:
        public: This site's public keys, for everybody.

    Raises:
        ConfigError: If `cryptography` is not installed, or the record cannot be read.
        PermissionDeniedError: If a process with this attempt, or a later one, has signed sums.
    """

    def __init__(
        self,
        site: str,
        context: Context,
        rules: SumRules,
        signer: Signer | None = None,
        verifier: Verifier | None = None,
        record: Mapping[str, Any] | None = None,
        keep: Callable[[Mapping[str, Any]], None] = lambda record: None,
        *,
        attempt: int = 1,
    ) -> None:
        check_available(site)
        self._site, self._context, self._rules, self._verifier = site, context, rules, verifier
        self._keys = RunKeys()
        self._own = KeysMessage(site, attempt, self._keys.exchange, self._keys.signing)
        signed = (signer.sign(keys_statement(context, self._own)), signer.certificate) if signer else (b"", b"")
        self.public = KeysMessage(site, attempt, self._keys.exchange, self._keys.signing, *signed).encode()
        self._signed, self._keep = SignedRounds(site, record, attempt=attempt), keep
        self._known: dict[str, tuple[bytes, KeysMessage]] = {}
        self._secrets: dict[bytes, bytes] = {}
        self._stages: dict[tuple[int, str], _Stage] = {}

    def begin(self, round: int, stage: str, publics: Mapping[str, bytes]) -> bytes:
        """Begin a stage: draw fresh seeds and share them.

        Args:
            round: Number of the round.
            stage: Name of the stage in the round.
            publics: Participant, this site among them -> its `public`.

        Returns:
            The message for the server. The same call returns the same message.

        Raises:
            PermissionDeniedError: If a rule of this site forbids it, or keys are not a participant's own.
            ProtocolError: If a message cannot be read.
        """
        if publics.get(self._site) != self.public:
            self._refuse("the participants do not include this site with its own keys", round, stage, _ASK)
        return self._begin(round, stage, {name: self._checked(name, publics[name]) for name in publics})

    def begin_next(self, round: int, stage: str, next_stage: str) -> bytes:
        """Begin a stage of the next round among the cohort of this one, as `begin` would with the same keys.

        Args:
            round: Number of the round under way, whose vectors this site has masked.
            stage: Name of the stage under way.
            next_stage: Name of the stage in the next round.

        Returns:
            The message for the server.

        Raises:
            PermissionDeniedError: If a rule of this site forbids it.
        """
        state = self._masked_stage(round, stage)
        return self._begin(round + 1, next_stage, {name: state.roster.keys(name) for name in state.cohort})

    def _begin(self, round: int, stage: str, keys: Mapping[str, KeysMessage]) -> bytes:
        if len(keys) < self._rules.min_cohort:
            rule = f"min_cohort={self._rules.min_cohort} of this site"
            self._refuse(f"{rule}: only {len(keys)} participate", round, stage)
        self._signed.check_begin(round, stage, keys)
        roster = Roster(self._context, round, stage, keys)
        known = self._stages.get((round, stage))
        if known is not None:
            if known.roster.digest != roster.digest:
                self._refuse("a stage begins once: it has begun with other participants or keys", round, stage, _ASK)
            return known.message
        self._stages = {key: each for key, each in self._stages.items() if self._signed.is_open(key[0])}
        if len(self._stages) >= _MAX_STAGES:
            self._refuse(f"a site takes part in at most {_MAX_STAGES} stages of the last rounds", round, stage)
        self._stages[round, stage] = begun = self._begun(roster)
        return begun.message

    def mask(
        self, round: int, stage: str, received: Mapping[str, bytes], vectors: Mapping[str, Array], ring: Ring
    ) -> None:
        """Add this stage's masks to vectors in place.

        A vector is masked once a stage: two vectors under the same masks would reveal their difference. The total of a
        name can be unmasked only if each survivor has sent a vector of that name.

        Args:
            round: Number of the round.
            stage: Name of the stage.
            received: What `ServerSums.deliver` returned for this site: sender -> the part of its message that is for
                this site. The senders are the cohort.
            vectors: Name -> contiguous array of the ring, masked in place.
            ring: The ring.

        Raises:
            PermissionDeniedError: If a rule of this site forbids it.
            ProtocolError: If a message was not made for this site and this stage.
        """
        state = self._begun_stage(round, stage)
        cohort = frozenset(received)
        if state.cohort and cohort != state.cohort:
            self._refuse("a stage has one cohort: it has masked with another", round, stage, _ASK)
        if again := state.masked & set(vectors):
            self._refuse(f"a vector is masked once a stage: {sorted(again)[0]!r} was", round, stage)
        if not state.cohort:
            self._check_cohort(state, cohort)
            opened = {name: self._opened(state, name, received[name]) for name in self._partners(state, cohort)}
            state.shares.update(opened)
            state.cohort = cohort
        state.masked |= set(vectors)
        partners = self._partners(state, cohort)
        added = [state.seed, *(state.pair_seeds[name] for name in partners if self._site < name)]
        subtracted = [state.pair_seeds[name] for name in partners if self._site > name]
        for name, vector in vectors.items():
            add_masks(vector, ring, self._context, name, added, subtracted)

    def sign_all(self, round: int, stage: str) -> bytes:
        """Sign that the whole cohort survives, before anybody knows whether it does.

        The signature spares the step `agree` if nobody drops out. It binds this site to nothing until it reveals shares
        for the whole cohort, so `agree` may still name others. docs/secure-sum.md says why that is safe.

        Args:
            round: Number of the round.
            stage: Name of the stage.

        Returns:
            The signature; b"" if the graph is sparse, where it would not be safe, or if no vector was masked.
        """
        state = self._masked_stage(round, stage)
        if not state.roster.is_complete or not state.masked:
            return b""
        state.signed_all = True
        return self._keys.sign(statement(state.roster.agreement(state.cohort, state.cohort)))

    def agree(self, round: int, stage: str, survivors: Sequence[str]) -> bytes:
        """Sign who the survivors of a stage are, once `keep` has written it down.

        Args:
            round: Number of the round.
            stage: Name of the stage.
            survivors: Those whose masked vectors the server has.

        Returns:
            The signature. The same call returns the same signature.

        Raises:
            PermissionDeniedError: If a rule of this site forbids it.
        """
        state, named = self._masked_stage(round, stage), tuple(sorted(set(survivors)))
        if state.survivors and named != state.survivors:
            self._refuse("one set of survivors a stage: it has agreed to another", round, stage, _ASK)
        if not set(named) <= state.cohort or len(named) != len(survivors):
            self._refuse("survivors are members of the cohort, each named once", round, stage, _ASK)
        if len(named) < self._rules.min_cohort:
            self._refuse(f"min_cohort={self._rules.min_cohort} of this site: {len(named)} survive", round, stage)
        if self._site in named and not state.masked:
            self._refuse("this site has masked no vector, and cannot be a survivor", round, stage, _ASK)
        self._check_neighbours(state, set(named))
        self._commit(state, named)
        return self._keys.sign(statement(state.roster.agreement(state.cohort, named)))

    def reveal(self, round: int, stage: str, signatures: Mapping[str, bytes]) -> bytes:
        """Reveal this site's shares: of the seeds b of survivors, and of the keys K of dropped sites.

        The survivors are those of `agree`. Without that call they are the whole cohort, if `sign_all` has signed it;
        `keep` has written that down before shares are returned.

        Args:
            round: Number of the round.
            stage: Name of the stage.
            signatures: Participant -> its signature of the survivors. Those of this site's holders count.

        Returns:
            The message for the server.

        Raises:
            PermissionDeniedError: If fewer of this site's holders than its threshold have signed the same survivors.
        """
        state = self._masked_stage(round, stage)
        if not state.survivors and not state.signed_all:
            self._refuse("shares are revealed after this site has agreed to survivors", round, stage)
        roster, survivors = state.roster, set(state.survivors or state.cohort)
        agreement = roster.agreement(state.cohort, survivors)
        holders = roster.holders(self._site)
        needed = self._rules.needed(len(holders))
        agreed, others = 1, list[str]()  # its own signature is the first
        for name in holders:
            if name == self._site or name not in signatures or agreed >= needed:
                continue
            if roster.has_agreed(name, agreement, checked_signature(name, signatures[name])):
                agreed += 1
            else:
                others.append(name)
        if agreed < needed:
            disagree = f"; the signatures of {', '.join(others)} are of something else" if others else ""
            self._refuse(
                f"threshold={self._rules.threshold:g} of this site: {needed} of its {len(holders)} holders must have "
                f"signed the same survivors, {agreed} have{disagree}",
                round,
                stage,
                _ASK if others else "it works once more sites have answered",
            )
        if not state.survivors:
            self._commit(state, tuple(sorted(survivors)))
        own = {name: state.shares[name][0] for name in holders if name in survivors}
        dropped = [name for name in self._partners(state, state.cohort) if name not in survivors]
        return RevealMessage(agreement, own, {name: state.shares[name][1] for name in dropped}).encode(round, stage)

    def record(self) -> dict[str, Any]:
        """Return what must outlive this process, as `keep` gets it."""
        return self._signed.record()

    def _checked(self, name: str, public: bytes) -> KeysMessage:
        """Return another site's keys, verified."""
        earlier = self._known.get(name)
        if earlier and earlier[0] == public:
            return earlier[1]
        keys = KeysMessage.parse(name, public)
        if name != self._site and self._verifier:
            if not keys.signature:
                raise PermissionDeniedError(
                    f"the keys of {name} for secure sums are not signed with a certificate", where=self._site, fix=_ASK
                )
            self._verifier.verify(name, keys_statement(self._context, keys), keys.signature, keys.certificate)
        if earlier and keys.attempt < earlier[1].attempt:
            raise PermissionDeniedError(
                f"the keys of {name} for secure sums are those of an earlier process of it", where=self._site, fix=_ASK
            )
        self._known[name] = bytes(public), keys
        return keys

    def _begun(self, roster: Roster) -> _Stage:
        """Return a new stage, with its seeds and the message that shares them."""
        site, holders, partners = self._site, roster.holders(self._site), roster.neighbours(self._site)
        seed, pairs_key, threshold = new_seed(), new_seed(), self._rules.needed(len(holders))
        points = [roster.number(name) for name in holders]
        halves = (split(int.from_bytes(secret, "big"), threshold, points) for secret in (seed, pairs_key))
        shares = dict(zip(holders, zip(*halves, strict=True), strict=True))
        pair_seeds = {name: self._pair_key(roster, name, "pair", *sorted((site, name))) for name in partners}
        sealed = {
            name: seal(
                self._pair_key(roster, name, "share", site, name),
                b"".join(share.to_bytes(SHARE_BYTES, "big") for share in shares[name]),
                roster.bound("share", site, name),
            )
            for name in partners
        }
        message = SharesMessage(
            roster.digest,
            threshold,
            hashlib.sha256(roster.bound("seed", site) + seed).digest(),
            seal(pairs_key, b"".join(pair_seeds[name] for name in partners), roster.bound("pairs", site)),
            sealed,
        )
        kept = {site: shares[site]}
        return _Stage(roster, seed, pair_seeds, kept, message.encode(roster.round, roster.stage))

    def _pair_key(self, roster: Roster, peer: str, purpose: str, first: str, second: str) -> bytes:
        """Return a key of this site and a peer for one purpose in one stage."""
        public = roster.keys(peer).exchange
        if public not in self._secrets:
            try:
                shared = self._keys.shared(public)
            except ValueError:
                raise ProtocolError(
                    f"the key of {peer} for secure sums is not a usable X25519 key", where=self._site, fix=_ASK
                ) from None
            self._secrets[public] = extract(shared + b"".join(sorted((public, self._keys.exchange))))
        return expand(self._secrets[public], roster.label(purpose, first, second))

    def _opened(self, state: _Stage, sender: str, sealed: bytes) -> tuple[int, int]:
        """Return the shares that a sender has sealed for this site."""
        roster = state.roster
        key = self._pair_key(roster, sender, "share", sender, self._site)
        try:
            data = unseal(key, bytes(sealed), roster.bound("share", sender, self._site))
            if len(data) != 2 * SHARE_BYTES:
                raise ValueError
        except ValueError:
            raise ProtocolError(
                f"the shares of {sender} for {self._site} were changed, or are not of round {roster.round}, stage "
                f"{roster.stage}, among the same participants with the same keys",
                where=self._site,
                fix=f"{sender} or the server is at fault: ask who runs them",
            ) from None
        return int.from_bytes(data[:SHARE_BYTES], "big"), int.from_bytes(data[SHARE_BYTES:], "big")

    def _check_cohort(self, state: _Stage, cohort: frozenset[str]) -> None:
        roster, rules = state.roster, self._rules
        if self._site not in cohort or not cohort <= set(roster.names):
            self._refuse("the cohort is a part of the participants, with this site", roster.round, roster.stage, _ASK)
        if len(cohort) < rules.min_cohort:
            self._refuse(
                f"min_cohort={rules.min_cohort} of this site: the shares of {len(cohort)} sites have arrived",
                roster.round,
                roster.stage,
            )
        holders = roster.holders(self._site)
        if len(cohort & set(holders)) < rules.needed(len(holders)):
            self._refuse(
                f"threshold={rules.threshold:g} of this site: {rules.needed(len(holders))} of its {len(holders)} "
                f"holders are needed, {len(cohort & set(holders))} take part",
                roster.round,
                roster.stage,
            )
        self._signed.check_begin(roster.round, roster.stage, cohort)

    def _check_neighbours(self, state: _Stage, survivors: set[str]) -> None:
        """Refuse survivors one of whom has lost so many neighbours that pair masks might not hide it."""
        roster = state.roster
        if roster.is_complete:
            return
        holders = len(roster.holders(self._site))  # as many as every other site has
        for name, left in roster.count_left(survivors).items():
            needed = (self._rules if name == self._site else SumRules()).needed(holders)
            if left < needed:
                self._refuse(
                    f"{left} of the {holders} holders of {name} survive, and it takes {needed} to hide its vector",
                    roster.round,
                    roster.stage,
                )

    def _commit(self, state: _Stage, survivors: tuple[str, ...]) -> None:
        """Bind this site to the survivors of a round, on disk too."""
        self._signed.sign(state.roster.round, state.roster.stage, survivors)
        self._keep(self.record())
        state.survivors = survivors

    def _partners(self, state: _Stage, cohort: frozenset[str]) -> list[str]:
        return [name for name in state.roster.neighbours(self._site) if name in cohort]

    def _begun_stage(self, round: int, stage: str) -> _Stage:
        state = self._stages.get((round, stage))
        if state is None:
            raise ProtocolError(
                f"this process has not begun the secure sum of round {round}, stage {stage}",
                where=self._site,
                fix="a site that was restarted takes part again from the next stage on",
            )
        return state

    def _masked_stage(self, round: int, stage: str) -> _Stage:
        state = self._begun_stage(round, stage)
        if not state.cohort:
            raise ProtocolError(
                f"this site has received no shares in the secure sum of round {round}, stage {stage}", where=self._site
            )
        return state

    def _refuse(self, rule: str, round: int, stage: str, fix: str = "wait until more sites take part") -> NoReturn:
        raise PermissionDeniedError(rule, where=f"{self._site}, secure sum of round {round}, stage {stage}", fix=fix)
