"""Course of a run with a secure sum: updates are masked, and only their sum over the sites becomes known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fl_runtime.aggregation.sums.call import MAX_BYTES, Call
from fl_runtime.aggregation.sums.strategy import CALL, VALUES
from fl_runtime.errors import ProtocolError
from fl_runtime.secure_sum.totals import ring_of_totals, shape_of_masked
from fl_runtime.secure_sum.travelling import ANSWER, as_message
from fl_runtime.secure_sum.vectors import COUNTS, NUMBERS, shape_of_numbers
from fl_runtime.server.calls import limits
from fl_runtime.server.courses.base import Offer, Status, UpdateChecks, Upload
from fl_runtime.server.courses.cross_site import CrossEvaluation
from fl_runtime.server.courses.initial import InitialModel
from fl_runtime.server.courses.rounds import Rounds
from fl_runtime.server.courses.scoring import Scoring
from fl_runtime.server.courses.secure_sum.contents import MaskedContent, MaskedModels, MaskedValues
from fl_runtime.server.courses.secure_sum.masked_sum import MaskedSum
from fl_runtime.server.courses.secure_sum.steps import PREFIX, mark_of
from fl_runtime.server.courses.synchronous import Synchronous
from fl_runtime.server.membership import Membership
from fl_runtime.server.registration import Member, agreed_layout
from fl_runtime.server.state import OpenRound, RunState
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import Settings, Update
from fl_runtime.wire.manifest import Manifest


class SecureSum:
    """Course of a run with a secure sum. A `Course`.

    Rounds are those of `Synchronous`, but each begins with the exchange of keys and of sealed shares. It ends with the
    agreement on whose updates are there, and with the shares of the masks that are left in their sum.
    """

    def __init__(
        self,
        state: RunState,
        membership: Membership,
        scoring: Scoring,
        rounds: Rounds,
        initial: InitialModel,
        cross_site: CrossEvaluation,
    ) -> None:
        self._state, self._membership, self._scoring, self._rounds = state, membership, scoring, rounds
        self._told: set[str] = set()
        self._inner = Synchronous(state, membership, rounds, initial, cross_site, self._begin_sum)
        self._sum: MaskedSum | None = None  # the sum of the round that was opened last
        self.checks = MaskedChecks(self._inner.checks, state, membership)

    def offer(self, member: Member, done: str) -> Offer | None:
        masked = self._masked()
        if masked is None:
            return None
        self._rounds.silent.discard(member.name)
        step = masked.steps.offer(member)
        if step is not None:
            return step
        needed = masked.steps.due(member)
        offer = self._inner.offer(member, done) if needed is not None else None
        if offer is None or needed is None:
            return None
        return replace(offer, config={**offer.config, "secure_sum": {**needed, **self._weight_of(member)}})

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        if stage.startswith(PREFIX):
            masked = self._masked()
            wanted = masked is not None and masked.steps.admits(site, attempt, stage)
            return None if wanted else "duplicate"  # a step that goes on without an answer makes no update late
        return self._inner.admit(site, attempt, round, stage)

    def accept(self, upload: Upload) -> Status:
        update, masked = upload.update, self._masked()
        if update.stage.startswith(PREFIX):
            self._state.blobs.free(upload.blob)
            assert masked is not None
            message = as_message(update.encoding.removeprefix(ANSWER), f"the answer of {update.site} to a step")
            masked.steps.take(update.site, update.attempt, message)
            return "used"
        mark = mark_of(update.encoding)
        steps = masked.steps if masked is not None else None
        if mark is None or steps is None or not steps.takes_vector(update.site, update.attempt, mark):
            self._state.blobs.free(upload.blob)
            return "late"
        return self._inner.accept(upload)

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        self._inner.task_sent(site, round, nbytes)

    def drive(self) -> None:
        self._inner.drive()

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        return self._inner.recover(unfinished)

    def _masked(self) -> MaskedSum | None:
        """The sum of the open round; None between rounds."""
        found = self._sum
        return found if found is not None and found.current is self._state.open_round else None

    def _weight_of(self, member: Member) -> Settings:
        """How a site weights its update: by the job's factor, and by its examples unless all sites count the same."""
        factor = self._state.settings.site_weights.get(member.name, 1.0)
        return {"factor": factor, "equal": getattr(self._state.plan.strategy, "weights", "examples") == "equal"}

    def _begin_sum(self, current: OpenRound) -> MaskedSum:
        ahead = self._sum.steps.ahead() if self._sum is not None else None
        self._sum = MaskedSum(self._state, self._membership, current, self._content(current), ahead)
        self._state.published.notify_all()
        return self._sum

    def _content(self, current: OpenRound) -> MaskedContent:
        state = self._state
        if state.plan.strategy.content == "encoded":
            return MaskedValues(len(state.settings.sites), current)
        return MaskedModels(state, self._scoring, current, state.models.newest, self._told)


class MaskedChecks:
    """Checks of answers to the steps, and of masked updates. See the protocol `UpdateChecks`."""

    def __init__(self, tensors: UpdateChecks, state: RunState, membership: Membership) -> None:
        self._tensors, self._state, self._membership = tensors, state, membership

    def check_layout(self, manifest: Manifest, content: str, encoding: str) -> None:
        """Refuse an answer with tensors, and a masked update whose vectors are not those of the agreed tensors."""
        if encoding.startswith(ANSWER):
            if manifest.tensors:
                raise ProtocolError("an answer to a step of the secure sum must not hold tensors")
            return
        if not encoding:  # the initial model
            self._tensors.check_layout(manifest, content, encoding)
            return
        if content != "encoded" or mark_of(encoding) is None:
            raise ProtocolError(
                "an update is not masked, in a job with secure_sum",
                fix="run the same version of fl-adapters at every site",
            )
        with self._state.lock:
            agreed = self._state.layouts.get(agreed_layout(self._membership.members))
            sums_values = self._sums_values()
        if sums_values:
            _check_values_of_call(manifest)
        else:
            self._check_vectors(manifest, agreed)

    def _sums_values(self) -> bool:
        return self._state.plan.strategy.content == "encoded"

    def check_values(self, update: Update) -> None:
        """Check the values of the initial model; those of a masked update are uniform whatever the site has sent."""
        if not update.encoding:
            if update.round > 0:
                raise ProtocolError("an update is not masked, in a job with secure_sum")
            self._tensors.check_values(update)
        elif self._sums_values() and CALL in update.arrays:  # an answer to a step has no tensors
            call = Call.from_array(update.arrays[CALL])
            ring = ring_of_totals(len(self._state.settings.sites), integers=call.integers)
            if call.kind == "union" or update.arrays[VALUES].shape != shape_of_masked(call.size, ring):
                raise ProtocolError(f"the masked values of {update.site} do not fit the call that it names")

    def _check_vectors(self, manifest: Manifest, agreed: Manifest | None) -> None:
        shapes = {t.name: t.shape for t in agreed.tensors if not t.extra} if agreed else {}
        numbers = 0
        for tensor in manifest.tensors:
            number = tensor.name.startswith(NUMBERS)
            numbers += number
            expected = shape_of_numbers(tensor.name) if number else shapes.get(tensor.name)
            if tensor.dtype != "uint64" or tensor.extra or tuple(tensor.shape) != expected:
                raise ProtocolError(f"the masked vector {tensor.name[:80]!r} is not one of the agreed tensors")
        if not any(tensor.name == COUNTS for tensor in manifest.tensors):
            raise ProtocolError("a masked update has no weight, so it cannot be part of a mean")
        if numbers > limits.MAX_METRICS:
            raise ProtocolError(f"a masked update has {numbers} single numbers; the limit is {limits.MAX_METRICS}")


def _check_values_of_call(manifest: Manifest) -> None:
    """Refuse a masked update of `fl_adapters.sums` that is not masked values and their call."""
    found = {tensor.name: (tensor.dtype, tensor.extra) for tensor in manifest.tensors}
    if found != {VALUES: ("uint64", False), CALL: ("uint8", False)} or manifest.nbytes > 2 * MAX_BYTES:
        raise ProtocolError(
            "a masked update of a sum does not consist of values and their call",
            fix="run the same version of fl-adapters at every site",
        )
