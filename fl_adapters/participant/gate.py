"""The gate of a site: everything that arrives or leaves passes its policy and its filters here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.participant.exchange import RegisteredModel
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.policy_gate import LeaveReason, policy_gate_of
from fl_adapters.participant.policy_gate.base import CohortGate
from fl_runtime.aggregation import make_strategy, strategy_of
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.metrics.ranking import WITHHELD, Ranking
from fl_runtime.client.job_settings import run_settings
from fl_runtime.errors import FederationError, ProtocolError, UpdateRefusedError
from fl_runtime.filters import check_repeatable
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.calibration import Participation, participation
from fl_runtime.filters.site import SiteFilters
from fl_runtime.secure_sum.context import noise_sharers
from fl_runtime.types import Arrays, Report, Settings, Task, Terms, Update
from fl_runtime.version import VERSION
from fl_runtime.wire.finite import check_finite
from fl_runtime.wire.names import Facts

if TYPE_CHECKING:  # it needs `cryptography`, which the base install does not bring
    from fl_runtime.trust.streams.identity import StreamIdentity


class Gate:
    """Decides what may leave a site, and applies the filters of the job and of the site's policy.

    The policy is asked before the filters, which may rename tensors, and again after them.
    When policy or filters refuse something, the gate calls `on_refusal` before it raises, so that the site leaves and
    the others need not wait for it.

    Attributes:
        tracking: Tracks the site's own metrics on this machine, if the policy says where.
    """

    def __init__(self, kit: Kit, framework: str, on_refusal: Callable[[LeaveReason], None]) -> None:
        """Read the site's policy.

        Args:
            kit: The site's startup kit.
            framework: Name of the training framework, as the policy and the server see it.
            on_refusal: Called with the reason when something is refused.

        Raises:
            ConfigError: The policy file cannot be read.
        """
        self._kit, self._framework, self._on_refusal = kit, framework, on_refusal
        self._policy = policy_gate_of(kit)
        self.tracking = self._policy.tracking
        self._filters: SiteFilters
        self._registered: RegisteredModel | None = None
        self._job: Settings = {}
        self._withheld = ""  # the metric of the best round, if filters withhold it

    @contextmanager
    def recording(self, action: str, round: int | None = None) -> Iterator[None]:
        """Record in the site's audit log what the site refuses in the block.

        Args:
            action: What is refused if the block fails.
            round: The round that it belongs to, if any.
        """
        with self._policy.refusals.recording(action, **({} if round is None else {"round": round})):
            yield

    @contextmanager
    def leaving_on_refusal(self, action: str, round: int | None = None) -> Iterator[None]:
        """If the block raises a FederationError, record it, call `on_refusal` with its text, and raise it again.

        Args:
            action: What is refused if the block fails.
            round: The round that it belongs to, if any.
        """
        try:
            with self.recording(action, round):
                yield
        except FederationError as error:
            self._on_refusal(replace(LeaveReason.of(error), text=error.what))
            raise

    def join(self, site: str, job: Settings) -> None:
        """Check whether the site may take part in the job, and set up the filters.

        Args:
            site: Name of the site.
            job: The job's settings from the server.

        Raises:
            PermissionDeniedError: The policy does not allow this job.
            ConfigError: A filter cannot work, or is not repeatable although the job asks for exact restarts.
        """
        with self.leaving_on_refusal("join"):
            self._policy.check_join(job, self._framework)
            if job.get("exact_restart"):
                check_repeatable(self._policy.filters)
            host = self._filter_host(site, job)
            self._filters = SiteFilters(job.get("filters", ()), self._policy.filters, host)
            self._job = job
            self.tracking.begin(job)

    def register(self, state: Arrays, terms: Terms) -> Mapping[str, str]:
        """Check the model that will be exchanged, before the handshake.

        Args:
            state: The tensors that will travel. Borrowed for the call.
            terms: What the script proposes where the job is silent.

        Returns:
            Facts about the filters that must be equal at all sites.
        """
        with self.leaving_on_refusal("register"):
            self._policy.check_handshake(list(state), terms)
            strategy = strategy_of(self._job.get("strategy"), terms)
            corrects = LocalTerms.from_config(strategy.configure(1, ())).control_variates
            extras = corrects or self._job.get("optimizer_state") == "average"
            self._registered = RegisteredModel.of(state, strategy) if terms.content == "weights" else None
            self._filters.agree(
                state,
                weights=terms.content == "weights",
                strategy=strategy,
                extras=extras,
                differences=self._job.get("late") == "carry",
            )
        if held := self._filters.held_back:
            shown = f"{', '.join(held[:2])}{', ...' if held[2:] else ''}"
            print(
                f"fl-adapters: {len(held)} running statistics ({shown}) stay at this site, since noise would spoil "
                "them; the global model keeps their first values. GroupNorm has none (docs/privacy.md)",
                file=sys.stderr,
                flush=True,
            )
        metric = Ranking.of(terms, self._job.get("best_metric"), self._job.get("best_mode")).metric
        self._withheld = metric if self._filters.withhold(metric) else ""
        return self._filters.agreement

    def declare(self, facts: Facts, training: Mapping[str, str]) -> tuple[Facts, Mapping[str, str]]:
        """Return what this site declares at the handshake, as the policy lets it leave. Call after `register`.

        Args:
            facts: What must be equal at all sites.
            training: What the server may know about how this site trains.

        Returns:
            The facts, and what the server may know about this site's software and filters.
        """
        return self._policy.visible_facts(facts), self._software(training)

    def _software(self, training: Mapping[str, str]) -> Mapping[str, str]:
        info = {"framework": self._framework, "python": platform.python_version(), "fl-adapters": VERSION, **training}
        filters = self._filters.described()
        visible = dict(self._policy.visible_software(info | ({"filters": filters} if filters else {})))
        return visible | ({WITHHELD: self._withheld} if self._withheld else {})

    # -- what arrives ----------------------------------------------------------------------------------------

    def receive(self, task: Task) -> Task:
        """Record an arriving task, reload the policy's filters if its file changed, and decode and check its arrays."""
        with self.leaving_on_refusal(f"task: {task.kind}", task.round):
            if self._policy.record_task(task):
                self._filters.set_policy_filters(self._policy.filters, self._policy.budget)
            self._policy.cohort.check(task)
            return self._decoded(task)

    def decode(self, task: Task) -> Task:
        """Decode and check the arrays of a model that this site evaluates or exports."""
        with self.leaving_on_refusal(f"task: {task.kind}", task.round):
            self._policy.cohort.check(task)
            return self._decoded(task)

    def check_cohort(self, task: Task) -> None:
        """Check that a round has as many sites as the policy asks for, before this site's update is shared."""
        with self.leaving_on_refusal(f"task: {task.kind}", task.round):
            self._policy.cohort.check(task)

    @property
    def cohort(self) -> CohortGate:
        """What the policy asks of every aggregate and every secure sum that this site is in."""
        return self._policy.cohort

    def check_registered(self, arrays: Arrays, where: str) -> None:
        """Check that an update has only tensors that were registered. Call after `register`."""
        if self._registered is not None:
            with self.leaving_on_refusal("send update"):
                self._registered.check_leaving(arrays, where)

    def _decoded(self, task: Task) -> Task:
        decoded = self._filters.received(task)
        if self._registered is not None and decoded.arrays:
            where = f"{task.kind} task of round {task.round}"
            self._registered.check_arrived(decoded.arrays, where)
            if not self._kit.simulated:  # in a simulation the server is this user's own
                _check_finite_model(decoded.arrays, where)
        return decoded

    # -- what leaves -----------------------------------------------------------------------------------------

    def send_initial(self, update: Update) -> Update:
        """Filter this site's weights for use as the initial model; return what leaves."""
        return self._checked_and_filtered(update, self._filters.initial, initial=True)

    def send_update(self, update: Update, task: Task) -> Update:
        """Check and filter the update that answers `task`; return what leaves."""
        return self._checked_and_filtered(update, lambda update: self._filters.outgoing(update, task))

    def send_report(self, report: Report) -> Report:
        """Check and filter a report; return what leaves."""
        with self.leaving_on_refusal("send report"):
            filtered = self._filters.report(report)
            self._policy.record_report(filtered)
        return filtered

    def release_files(self, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, str]]:
        """Choose the small files beside the model that may go to the server, and record them.

        Args:
            files: Name -> contents.

        Returns:
            Those that may leave; and the name of each that stays -> the rule of the policy that keeps it.
        """
        kept = self._policy.files.kept_back(files)
        return {name: data for name, data in files.items() if name not in kept}, kept

    def shares_progress(self) -> bool:
        """Return whether the server may be told how far this site's training is, and for how long it has trained."""
        return self._policy.progress.allowed and not self._filters.hides_counts

    def leave(self, reason: LeaveReason, *, early: bool) -> str:
        """Return the reason for leaving as the server may see it, and record the full one."""
        return self._policy.record_leaving(reason, early=early)

    # -- state and identity ----------------------------------------------------------------------------------

    @property
    def encrypts(self) -> bool:
        """Whether updates are encrypted for the server. Known after `register`."""
        return self._filters.encrypts

    def own_values(self, arrays: Arrays) -> Arrays:
        """Return this site's arrays that it keeps instead of the arriving ones. Not copied."""
        return self._filters.own_values(arrays)

    def restore(self, own_values: Arrays) -> None:
        """Restore the arrays that an earlier process of this site got from `own_values`. Call after `register`."""
        self._filters.restore(own_values)

    def stream_identity(self) -> StreamIdentity | None:
        """Return what proves this site's identity to other sites, or None if there are no certificates."""
        return self._policy.stream_identity()

    def _checked_and_filtered(
        self, update: Update, apply_filters: Callable[[Update], Update], *, initial: bool = False
    ) -> Update:
        with self.leaving_on_refusal("send update", update.round):
            self._policy.check_names([*update.arrays, *update.extras], update.round, initial=initial)
            filtered = apply_filters(update)
            if filtered.arrays is not update.arrays:
                check_finite(filtered.arrays, f"{update.site}, round {update.round}, after the filters")
            self._policy.record_update(filtered)
        return filtered

    def _filter_host(self, site: str, job: Settings) -> FilterHost:
        folder = self._kit.credentials or self._kit.folder
        return FilterHost(
            site,
            str(job["name"]),
            Path(folder) if folder else None,
            budget=self._policy.budget,
            shared=Path(self._kit.run, "sites") if self._kit.simulated else None,
            participation=_participation(site, job),
            sharing=noise_sharers(run_settings(job).sites_per_round) if job.get("secure_sum") else 0,
        )


def _participation(site: str, job: Settings) -> Participation | None:
    """Return the rounds in which the site is expected to take part, or None if the job sets no number of rounds."""
    if not job.get("rounds"):
        return None
    settings = run_settings(job)
    strategy = make_strategy(settings.strategy) if settings.strategy else None
    return participation(settings, strategy)[site]


def _check_finite_model(arrays: Arrays, where: str) -> None:
    try:
        check_finite(arrays, where)
    except UpdateRefusedError as error:
        raise ProtocolError(
            f"the server sends a model with {error.what}",
            where=where,
            fix="ask the server's operator; training on it, and noise scaled by it, would be worthless",
        ) from None
