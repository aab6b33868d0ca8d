"""The contract of a course: how a run proceeds from the sites' agreement to its last global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fl_runtime.server.courses.sums.failures import SumFailedError
from fl_runtime.server.models import Model
from fl_runtime.server.registration import Member
from fl_runtime.server.state import Accepted, RunState
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal_entries import RoundEntry
from fl_runtime.types import UPDATES, Settings, TaskKind, Update
from fl_runtime.wire.manifest import Manifest

Status = Literal["used", "late", "carried", "duplicate"]


@dataclass(frozen=True)
class Offer:
    """A task for one site.

    Attributes:
        kind: What the site is asked to do.
        round: The round that the task belongs to.
        config: Settings that travel with the task; JSON values.
        model: The model that the task carries, or None. It is leased: whoever takes the offer calls
            `Models.release(model)` when the model has been sent.
        layout_known: True if the site has the manifest of the model's layout already.
        stage: Which try at the round this is; an update must name the same one.
    """

    kind: TaskKind
    round: int
    config: Settings
    model: Model | None
    layout_known: bool
    stage: str = ""


@dataclass(frozen=True)
class Upload:
    """An update whose bytes have arrived and been verified.

    Attributes:
        update: The update; its arrays are views of `blob`.
        blob: The file that it lies in.
        digest: Digest of its tensors.
        header: The update's other fields, as JSON values for the journal.
        bytes_up: Bytes of the messages that it came in.
    """

    update: Update
    blob: Blob
    digest: bytes
    header: Mapping[str, Any]
    bytes_up: int


class UpdateChecks(Protocol):
    """The checks that an update must pass before it may count."""

    def check_layout(self, manifest: Manifest, content: str, encoding: str) -> None:
        """Check the names, shapes and dtypes of an update's tensors, before its bytes are taken.

        Called without the lock, since the comparison may be long.

        Args:
            manifest: The tensors that the site announces.
            content: What they hold: "weights", "delta" or "encoded".
            encoding: How they are encoded, as the update names it.

        Raises:
            StateMismatchError: They are not the tensors that the sites agreed on.
            UpdateRefusedError: The content or encoding does not fit the job.
            ProtocolError: The encoding cannot be read, or the update is too large.
        """
        ...

    def check_values(self, update: Update) -> None:
        """Check an update whose bytes have arrived. Called without the lock, by many threads.

        Args:
            update: The update; its arrays are borrowed.

        Raises:
            UpdateRefusedError: It does not decode to finite weights, or the strategy refuses it.
            ProtocolError: Its encoding cannot be read.
        """
        ...


class Course(Protocol):
    """How a run proceeds: one implementation per mode (synchronous rounds, buffered, swarm, virtual).

    A run asks its course and never which course it has. `offer`, `admit`, `accept` and `task_sent` answer the sites'
    calls; they are called under the run's lock and must not do anything that takes long. `drive` runs in the thread of
    the run and takes the lock itself.
    """

    @property
    def checks(self) -> UpdateChecks:
        """The checks that every update of this course must pass."""
        ...

    def offer(self, member: Member, done: str) -> Offer | None:
        """The task that a site can begin now. Called while the run is in its training phase.

        Args:
            member: The site; it is active.
            done: Stage of the last "share" or "aggregate" task that the site has completed, or "".

        Returns:
            The task, or None if the site has to wait.
        """
        ...

    def admit(self, site: str, attempt: int, round: int, stage: str) -> Status | None:
        """Decide about an update before its bytes are sent, and again before it is accepted.

        May wait until the round that the update belongs to is opened or dropped.

        Args:
            site: Name of the site.
            attempt: Number of its process.
            round: Round of the task that the update answers.
            stage: Stage of that task.

        Returns:
            None if the update is wanted, or else what it counts as without being sent.

        Raises:
            ProtocolError: The update is for a round that has not been opened.
        """
        ...

    def accept(self, upload: Upload) -> Status:
        """Count an update that `admit` has just let in. It must be in the journal before it counts.

        Args:
            upload: The update. The course takes over its file, and frees it if the update does not count.

        Returns:
            What the update counts as.

        Raises:
            UpdateRefusedError: It does not go with the other updates of the round.
        """
        ...

    def task_sent(self, site: str, round: int, nbytes: int) -> None:
        """Note how many bytes of messages a task took.

        Args:
            site: The site that the task was sent to.
            round: Round of the task.
            nbytes: Bytes of all its messages, those of a transfer that broke off included.
        """
        ...

    def drive(self) -> None:
        """Take the run from where it stands to its last global model. Called once, without the lock.

        Raises:
            FederationError: The run cannot go on; it ends with this error.
        """
        ...

    def recover(self, unfinished: Sequence[RoundEntry]) -> set[str]:
        """Restore the course's own state from the journal, after a server was started again. Called before `drive`.

        Args:
            unfinished: The journal's rounds that were opened and not closed.

        Returns:
            Names of the files of updates and older models that the course still needs; others are deleted.

        Raises:
            StoreError: A file does not hold what the journal says.
        """
        ...


class RoundSum(Protocol):
    """How one round's updates become the next global model."""

    strategy_state: Blob | None
    """Tensors that the strategy keeps at the server beside the next model, or None."""
    base: Model | None
    """The global model that the next one is compared with; None if there is none, or a site compares them."""

    def next_in_order(self) -> Accepted | None:
        """The update that can be summed now, or None. Called under the lock."""
        ...

    def add(self, accepted: Accepted) -> None:
        """Add an update to the sum. Called without the lock.

        Args:
            accepted: The update that `next_in_order` has just returned.
        """
        ...

    def finish(self) -> Blob | None:
        """Complete the sum. Called without the lock, once the round takes no more updates.

        Returns:
            The next global model, or None if the round has to take updates again.

        Raises:
            RoundFailedError: These updates cannot be combined into a model: the round is opened again.
        """
        ...

    def to_blame(self, failure: SumFailedError) -> Sequence[str]:
        """Find the sites without whose updates the sum would not have failed. Called without the lock.

        Args:
            failure: What is wrong with the sum.

        Returns:
            Their names; none if nobody can be told.
        """
        ...

    def give_up(self) -> None:
        """Free the files of a sum that is not needed any more."""
        ...


def leased(kind: TaskKind, round: int, config: Settings, model: Model | None, member: Member, stage: str = "") -> Offer:
    """An offer of this model, whose file is not recycled until the offer is released. Called under the lock."""
    assert model is not None
    model.leases += 1
    layout = model.blob.manifest.layout
    known = layout in member.layouts
    member.layouts.add(layout)
    return Offer(kind, round, config, model, known, stage)


def made_of(state: RunState, version: int) -> dict[str, int]:
    """The setting of a task that says of how many sites' updates its model was made; none for an initial model."""
    made = next((result for result in reversed(state.results) if result.round == version), None)
    return {UPDATES: len(made.sites)} if made else {}
