"""The state of one run: journal, files, models, phase and results, behind one lock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import FederationError, StoreError
from fl_runtime.filters import check_budgets, check_filters
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.calibration import Participation
from fl_runtime.filters.server import ServerFilters, applied_filters
from fl_runtime.secure_sum.requirements import check_secure_sum
from fl_runtime.secure_sum.travelling import MASKED, without_messages
from fl_runtime.server.models import Models
from fl_runtime.server.records.events import Emitter
from fl_runtime.server.records.results import RoundResult
from fl_runtime.server.registration import Member
from fl_runtime.store.blobs import Blob
from fl_runtime.store.stores import Store
from fl_runtime.trainings import first_folder
from fl_runtime.transport.waiting import duration_text
from fl_runtime.types import Metrics, RunSettings, Settings, Strategy, Terms, Update
from fl_runtime.wire.manifest import Manifest

log = logging.getLogger(__name__)

RunPhase = Literal["joining", "initial", "training", "final", "done", "failed"]


@dataclass(frozen=True)
class Accepted:
    """An update that counts in a round or buffer.

    Attributes:
        update: The update; its arrays are views of `blob`.
        blob: The file that its tensors lie in.
        digest: Digest of its tensors.
    """

    update: Update
    blob: Blob
    digest: bytes


@dataclass(frozen=True)
class Pooled:
    """What is known of the updates of a round together, and of none alone.

    Attributes:
        metrics: Means of their metrics.
        num_examples: Number of examples of all sites.
        local_steps: Number of optimizer steps of all sites.
    """

    metrics: Metrics
    num_examples: int
    local_steps: int


@dataclass
class OpenRound:
    """The round under way. Changed only under the run's lock.

    Attributes:
        round: Number of the round; 0 makes the initial model.
        participants: Names of the sites whose updates the round waits for.
        config: Settings that travel with the round's tasks.
        began: When the round was opened, in seconds of the clock of `Membership`.
        stage: "" for the first try at the round, then "2", "3", and so on.
        accepted: Updates that count so far, by site.
        bytes_down: Bytes of tasks sent in this round, by site.
        bytes_up: Bytes of updates received in this round, by site.
        collected: True once the round takes no more updates; the last of them are being summed.
        drawn: True if the participants are a selection that no other site may join.
        answers: Number of updates the round waits for, or None to wait for all participants.
        pooled: Metrics and counts over all sites, where those of single sites are not known; else None.
    """

    round: int
    participants: list[str]
    config: Settings
    began: float
    stage: str = ""
    accepted: dict[str, Accepted] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    collected: bool = False
    drawn: bool = False
    answers: int | None = None
    pooled: Pooled | None = None

    def takes(self, site: str) -> bool:
        """Whether this site may contribute to the round."""
        return not self.drawn or site in self.participants


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long.

    Attributes:
        job: The job's settings, as sites see them when they join.
        strategy: The strategy that makes the global models.
        terms: What the sites' scripts agreed on at the handshake; the defaults before it.
        rounds: Number of the last round, or None before the handshake.
        negotiable: True if the sites' terms name the strategy, because the job does not.
    """

    job: RunSettings
    strategy: Strategy
    terms: Terms = field(default_factory=Terms)
    rounds: int | None = None
    negotiable: bool = False


class RunState:
    """State of one run, shared by the objects that drive it.

    Every field is read and changed under `lock` only. `changed` and `published` are conditions of that lock: `changed`
    wakes the thread that drives the run, `published` wakes the sites' calls that wait for a task or a result. A fact is
    written to the journal before anyone learns of it. Nothing that takes long, such as summing, happens under the lock.

    Attributes:
        settings: The settings that hold in this run: the job's, without those about models if it trains none.
        events: Where the run's events are emitted.
        journal: The record that a killed server continues from.
        blobs: The files of models and updates.
        layouts: Every manifest that has been used in this run, by its layout digest.
        filters: The job's filters at the server.
        models: The newest and the best global model.
        plan: Strategy, terms and number of rounds.
        phase: Where the run stands, from "joining" to "done" or "failed".
        open_round: The round under way; None between rounds, and always None in a buffered run.
        results: The rounds that are closed, in order.
        error: Why the run failed, or None.
    """

    def __init__(
        self, settings: RunSettings, folder: Path, events: Emitter, store: Store, strategy: Strategy | None = None
    ) -> None:
        """Open the run's folder, or make it.

        Args:
            settings: The job's settings. The journal must have none, or the same.
            folder: Folder of the run.
            events: Where to emit the run's events.
            store: Keeps the journal and the blobs.
            strategy: A strategy to use in place of the one that `settings`, or else the sites' terms, name.
        """
        self.settings, self.events = settings, events
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.published = threading.Condition(self.lock)
        negotiable = strategy is None and settings.strategy is None
        self.plan = Plan(
            settings, strategy or make_strategy(settings.strategy or Terms().strategy), negotiable=negotiable
        )
        durable = settings.durability == "power"
        self.journal = store.journal(folder, durable=durable)
        self.journal.begin(settings)
        self.blobs = store.blobs(folder, durable=durable)
        self.layouts: dict[bytes, Manifest] = {}
        plan = Participation.every_round(settings.rounds, settings.trainings or 1) if settings.rounds else None
        first = first_folder(folder, settings.name)  # one ledger for all trainings of the job
        self.filters = ServerFilters(settings.filters, FilterHost(job=settings.name, folder=first, participation=plan))
        self.models = Models(self.journal, self.blobs, self.lock)
        self.phase: RunPhase = "joining"
        self.open_round: OpenRound | None = None
        self.results: list[RoundResult] = []
        self.error: FederationError | None = None

    def agree(self, terms: Terms) -> None:
        """Adopt the sites' terms where the job leaves them open.

        Raises ConfigError if the job's filters do not fit them.
        """
        proposed = make_strategy(terms.strategy)
        strategy = proposed if self.plan.negotiable or proposed.open_ended else self.plan.strategy
        self.settings = self.plan.job.without_model() if strategy.open_ended else self.plan.job
        self.plan = replace(self.plan, strategy=strategy, terms=terms)
        check_filters(self.settings.filters, self.settings.optimizer_state, strategy)
        check_secure_sum(self.settings, strategy)

    def begin(self, rounds: int, sites: Sequence[str], manifest: Manifest) -> None:
        """Record that the sites have agreed on `rounds` rounds, at most, of the model that `manifest` describes.

        Raises ConfigError if a privacy budget of the job's filters does not allow so many rounds.
        """
        open_ended = self.plan.strategy.open_ended
        planned = replace(self.settings, rounds=None if open_ended else rounds)
        check_budgets(self.settings.filters, planned, self.plan.strategy)
        self.journal.agreed(rounds, self.plan.terms)
        self.plan = replace(self.plan, rounds=rounds)
        filters: dict[str, Any] = {"filters": list(self.settings.filters)} if self.settings.filters else {}
        self.events.emit(
            "started",
            rounds=planned.rounds or 0,
            sites=list(sites),
            tensors=len(manifest.tensors),
            bytes=manifest.nbytes,
            **filters,
        )

    def restore_plan(self) -> None:
        """Restore the number of rounds and the sites' terms from the journal, if they had agreed."""
        self.plan = replace(self.plan, rounds=self.journal.reader.rounds())
        if self.plan.rounds is not None:
            self.agree(self.journal.reader.terms())

    def stop_after(self, round: int) -> None:
        """Make `round` the last round of the run."""
        self.plan = replace(self.plan, rounds=round)
        self.journal.agreed(round, self.plan.terms)
        self.changed.notify_all()

    def standing_of(self, member: Member, now: float) -> str:
        """Where a site stands at this moment, as a human-readable message.

        Args:
            member: The site.
            now: The time of the clock of `Membership`, in seconds.
        """
        if not member.active or member.script == "resting":
            return member.standing
        if member.attending == 0:
            away = "" if member.absent_since is None else f" for {duration_text(now - member.absent_since)}"
            return f"absent{away}; it may come back"
        current = self.open_round
        if self.phase != "training" or (current is None and self.plan.strategy.buffer is None):
            return "connected; waits"
        if current is None:
            return "connected; trains"
        if current.takes(member.name) and member.name not in current.accepted and not current.collected:
            return f"connected; trains round {current.round}"
        return "connected; waits for the others"

    def enter(self, phase: RunPhase) -> None:
        """Go on to the next phase, and wake the sites' calls."""
        self.phase = phase
        self.published.notify_all()

    def add_layout(self, manifest: Manifest) -> None:
        """Keep a manifest, so that later messages can refer to it by its layout digest."""
        if manifest.layout not in self.layouts:
            self.layouts[manifest.layout] = manifest
            self.journal.layout(manifest)

    def emit_update(
        self, update: Update, status: str, *, round: int, seconds: float, bytes_up: int, bytes_down: int
    ) -> None:
        """Emit the event of an update that arrived `seconds` into its round; wake the thread that drives the run."""
        ran = without_messages(applied_filters(update.encoding))
        masked = bool(ran) and ran[-1].get("name") == MASKED
        counts = {} if masked else {"num_examples": update.num_examples, "local_steps": update.local_steps}
        self.events.emit(
            "update",
            round,
            update.site,
            status=status,
            **counts,
            metrics=dict(update.metrics),
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            seconds=seconds,
            **({"train_s": update.train_s} if update.train_s else {}),
            **({"filters": ran} if ran else {}),
        )
        self.changed.notify_all()

    def fail(self, error: FederationError) -> None:
        """End the run with an error that every site gets too.

        A StoreError alone halts the run: it is not recorded as the end, so that the run continues from its journal when
        the server is started again. Sites wait for that as for a server that is away.
        """
        with self.lock:
            if self.phase in ("failed", "done") or self.blobs.closed:
                return
            self.phase, self.error = "failed", error
            self.events.emit("failed", error=error.to_wire())
            self.published.notify_all()
            self.changed.notify_all()
            if not isinstance(error, StoreError):
                try:
                    self.journal.ended(error)
                except StoreError as failure:
                    log.error("the end of the run could not be recorded in its journal: %s", failure)

    def halt(self) -> None:
        """Stop where the journal stands, because the server is being closed. It may be started again."""
        with self.lock:
            self.blobs.close()
            self.published.notify_all()
            self.changed.notify_all()

    def raise_if_ended(self, *, even_done: bool = False) -> None:
        """Raise the error of a run that failed, or StoreError if the server was closed before the run was done.

        Args:
            even_done: Raise for a closed server also if the run is done. Without it, sites may still ask about the end.
        """
        if self.error is not None:
            raise self.error
        if self.blobs.closed and (even_done or self.phase != "done"):
            raise StoreError("the server was closed", fix="start it again to go on")


def stage_of(failed_tries: int) -> str:
    """Name of a try at a round: "" for the first, then "2", "3", and so on."""
    return str(failed_tries + 1) if failed_tries else ""
