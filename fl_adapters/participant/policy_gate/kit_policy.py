"""The policy file of a startup kit, enforced and recorded in the site's audit log."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.policy_gate.base import CohortGate, FilesGate, PolicyGate, ProgressGate, TrackingGate
from fl_adapters.participant.policy_gate.job_rules import job_refusals, strategy_refusals
from fl_adapters.participant.policy_gate.reasons import LeaveReason
from fl_adapters.participant.policy_gate.refusals import LoggedRefusals
from fl_adapters.participant.policy_gate.slots import acquire_slot
from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.client.job_settings import run_settings
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.filters.ledger import BudgetLimit, PrivacyBudget
from fl_runtime.filters.server import applied_filters
from fl_runtime.trainings import job_of
from fl_runtime.types import CohortRules, Report, RunSettings, Settings, Summary, Task, Terms, Update
from fl_runtime.wire.names import Facts, Names

if TYPE_CHECKING:  # most need `cryptography`, which the base install does not bring
    from fl_adapters.environments.tracking.site import SiteTracking
    from fl_runtime.secure_sum import SumRules
    from fl_runtime.trust.approval import Decision
    from fl_runtime.trust.audit import AuditLog, Witness
    from fl_runtime.trust.policy import Policy, PolicyFile
    from fl_runtime.trust.streams.identity import StreamIdentity
    from fl_runtime.trust.streams.kit_signatures import KitSignatures

_ADAPTERS = {"transformers": "hf"}  # framework -> name of its adapter, if they differ


class KitPolicyGate(PolicyGate):
    """Enforces the policy file of a startup kit, and writes the site's audit log.

    The policy file is read again whenever it has changed. Every method raises PermissionDeniedError, which names the
    rule, for what the policy does not allow. A policy that cannot be read raises ConfigError, so nothing leaves.

    Attributes:
        identity: Identity of the site, from its certificate.
        refusals: Writes what the site refuses to its audit log.
    """

    def __init__(self, folder: Path, jobs: Path | None = None, audit: AuditLog | None = None) -> None:
        """Read the policy.

        Args:
            folder: Folder of the startup kit.
            jobs: Folder of this site's jobs, which holds what people have decided about them. Default: `jobs` in the
                kit.
            audit: The site's audit log, if it is open already.

        Raises:
            ConfigError: The kit is not one of a site, or its policy cannot be read.
        """
        from fl_runtime.trust.audit import AuditLog
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.policy import PolicyFile

        kit = read_kit(folder, kind="site")
        self.identity = kit.identity
        self._jobs = jobs or kit.folder / "jobs"
        self._audit: AuditLog = audit or AuditLog(kit.folder, kit.folder)
        self.refusals: LoggedRefusals = LoggedRefusals(self._audit, kit.identity)
        self._lists: list[str] = []  # names of the lists that the site declares
        self._strategy: str | None = None  # the job's, if it names one
        self._settings: RunSettings | None = None  # of the job
        self._names: list[str] = []  # of the tensors that were named at the handshake
        try:
            self._file: PolicyFile = PolicyFile(kit.policy_file)
            if audit is None:
                self._audit.ship_to(self._file.current.syslog)
        except FederationError as error:
            self.refusals.record("read policy", error)
            raise
        self.cohort = _KitCohortGate(self)
        self.files = _KitFilesGate(self)
        self.progress = _KitProgressGate(self)
        self.tracking = _KitTrackingGate(self)

    def check_join(self, job: Settings, framework: str) -> None:
        self.refusals.job = str(job["name"])
        with self.refusals.recording("join"):
            self._check_job(job)
            self._check_approval(job)
            self._policy.check_adapter(_ADAPTERS.get(framework, framework), self.identity)
        self._audit.write("joined", self.identity, job=self.refusals.job, submitted_by=str(job.get("submitted_by", "")))

    def check_job(self, job: Settings) -> None:
        """Check and record whether this site may run a job, before its command is started.

        Args:
            job: Settings of the job.

        Raises:
            PermissionDeniedError: The policy does not allow the job.
        """
        self.refusals.job = str(job["name"])
        with self.refusals.recording("run"):
            self._file.refresh()
            self._check_job(job)

    def _check_job(self, job: Settings) -> None:
        self._strategy, self._settings = job.get("strategy"), run_settings(job)
        for refusal in job_refusals(self._policy, self.identity, job):
            raise refusal

    def decision_on(self, job: Settings) -> Decision | None:
        """Return what somebody at the site has decided about a job, if the policy asks for that.

        Args:
            job: Settings of the job, as the server sends them.

        Returns:
            The decision, which is an approval if the policy does not ask. None if nobody has decided.
        """
        from fl_runtime.trust.approval import Decision, decision_on

        if self._policy.approve is None:
            return Decision(True, "", "", 0.0)
        return decision_on(self._jobs / job_of(str(job["name"])), job)

    def _check_approval(self, job: Settings) -> None:
        decision = self.decision_on(job)
        approved = decision is not None and decision.approved
        self._policy.check_approval(str(job["name"]), self.identity, approved=approved)

    def check_handshake(self, names: Sequence[str], terms: Terms) -> None:
        with self.refusals.recording("register"):
            self._policy.check_names(names, self.identity)
            script = make_strategy(terms.strategy)
            if self._settings is not None and (self._strategy is None or script.shows or script.open_ended):
                for refusal in strategy_refusals(self._policy, self.identity, self._settings, terms.strategy):
                    raise refusal
        self._names = list(names)

    def visible_facts(self, facts: Facts) -> Facts:
        self._lists = [name for name, fact in facts.items() if isinstance(fact, Names)]
        if self._policy.names:
            return facts
        return {n: replace(fact, from_data=True) if isinstance(fact, Names) else fact for n, fact in facts.items()}

    def visible_software(self, info: Mapping[str, str]) -> Mapping[str, str]:
        visible = info if self._policy.info else {}
        count, names = len(self._names), self._names
        facts: dict[str, Any] = {"tensors": count, "names": names, "lists": self._lists, "software": dict(visible)}
        self._audit.write("handshake", self.identity, job=self.refusals.job, **facts)
        return visible

    def record_task(self, task: Task) -> bool:
        self._audit.write(f"task: {task.kind}", job=task.job, round=task.round, version=task.version)
        with self.refusals.recording("read policy", round=task.round):
            changed = self._file.refresh()
        if changed:
            self._audit.write(
                "policy changed", job=task.job, round=task.round, policy=self._policy.model_dump(mode="json")
            )
        return changed

    @property
    def filters(self) -> Sequence[Settings]:
        return self._policy.filters

    @property
    def budget(self) -> BudgetLimit | None:
        limit = self._policy.privacy
        return (
            BudgetLimit(PrivacyBudget(limit.epsilon, limit.delta), self.identity.name, all_jobs=True) if limit else None
        )

    def check_names(self, names: Sequence[str], round: int, *, initial: bool) -> None:
        with self.refusals.recording("send update", round=round):
            self._policy.check_names(names, self.identity)
            if initial:
                self._policy.disclosure.check_initial(self.identity)

    def record_update(self, update: Update) -> None:
        arrays = (*update.arrays.values(), *update.extras.values())
        size = sum(array.nbytes for array in arrays)
        with self.refusals.recording("send update", round=update.round):
            self._policy.check_bytes(size, self.identity)
        self._audit.write(
            "update",
            self.identity,
            job=update.job,
            round=update.round,
            tensors=len(arrays),
            numbers=sum(array.size for array in arrays),
            bytes=size,
            num_examples=update.num_examples,
            local_steps=update.local_steps,
            metrics=dict(update.metrics),
            filters=list(applied_filters(update.encoding)),
        )

    def record_report(self, report: Report) -> None:
        metrics, examples = plain(report.metrics), report.num_examples
        self._audit.write(
            "report",
            self.identity,
            job=self.refusals.job,
            version=report.version,
            metrics=metrics,
            num_examples=examples,
        )

    def visible_reason(self, reason: LeaveReason) -> str:
        if self._policy.reasons:
            return reason.text
        if reason.error is not None and reason.error is self.refusals.by_policy:
            return self.refusals.by_policy.what
        return reason.public

    def record_leaving(self, reason: LeaveReason, *, early: bool) -> str:
        visible = self.visible_reason(reason)
        self._audit.write("left", self.identity, job=self.refusals.job, reason=reason.text, told=visible, early=early)
        return visible

    def stream_identity(self) -> StreamIdentity:
        from fl_runtime.trust.streams.identity import StreamIdentity

        self._audit.write("stream", self.identity, job=self.refusals.job)
        return StreamIdentity(self._file.path.parent)  # read each time: a certificate may be renewed during a run

    # -- for `fl-adapters run` and `fl-adapters site` ---------------------------------------------------------

    def record(self, action: str, **facts: Any) -> None:
        """Write an action of this site to its audit log.

        Args:
            action: What the site did.
            **facts: Further facts; JSON values.
        """
        self._audit.write(action, self.identity, **facts)

    def witness(self) -> Witness:
        """Return the witness that notes lines of the server's audit log in this site's, and tells the server of it."""
        from fl_runtime.trust.audit import Witness

        return Witness(self._audit, self._file.path.parent, self.identity)

    @contextmanager
    def process_slot(self) -> Iterator[None]:
        """Occupy one of the slots for commands that may run at the same time, during a `with` block.

        Raises:
            PermissionDeniedError: All slots are occupied.
        """
        most = self._policy.resources.processes
        slot = self.free_slot()
        with self.refusals.recording("run"):
            if slot is None:
                raise PermissionDeniedError(
                    f"{self.identity} may not run another command",
                    where=f"rule resources: processes: {most} (the site's policy.yml)",
                    fix="wait until a command has ended, or raise the number there",
                )
        with slot:
            yield

    def free_slot(self) -> ExitStack | None:
        """Occupy one of the slots for commands that may run at the same time.

        Returns:
            Frees the slot when it is closed. None if all slots are occupied.
        """
        slot = ExitStack()
        most = self._policy.resources.processes
        if most is None:
            return slot
        file = acquire_slot(self._file.path.parent, most)
        if file is None:
            return None
        slot.enter_context(file)
        return slot

    @property
    def policy(self) -> Policy:
        """The policy as its file is now; as it was read last if the file cannot be read."""
        with suppress(FederationError):
            self._file.refresh()
        return self._policy

    @property
    def _policy(self) -> Policy:
        return self._file.current


class _KitCohortGate(CohortGate):
    """Enforces the rules on cohorts of the policy as it is now."""

    def __init__(self, gate: KitPolicyGate) -> None:
        self._gate = gate

    @property
    def rules(self) -> CohortRules:
        return self._gate._policy.rules

    @property
    def sum_rules(self) -> SumRules:
        from fl_runtime.secure_sum import SumRules

        policy = self._gate._policy
        rules = SumRules(max(policy.min_cohort, 2))
        return rules if policy.sum_threshold is None else replace(rules, threshold=policy.sum_threshold)

    def signatures(self) -> KitSignatures:
        from fl_runtime.trust.streams.kit_signatures import KitSignatures

        return KitSignatures(self._gate._file.path.parent)

    def check(self, task: Task) -> None:
        with self._gate.refusals.recording(f"task: {task.kind}", round=task.round):
            self._gate._policy.cohort.check_task(task, self._gate.identity)


class _KitFilesGate(FilesGate):
    """Asks the policy as its file is now, and records the digests of what leaves."""

    def __init__(self, gate: KitPolicyGate) -> None:
        self._gate = gate

    def kept_back(self, files: Mapping[str, bytes]) -> dict[str, str]:
        kept = self._gate.policy.files.kept_back({name: len(data) for name, data in files.items()})
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name not in kept}
        self._gate.record("files", job=self._gate.refusals.job, sha256=digests, kept=kept)
        return kept


class _KitProgressGate(ProgressGate):
    """Asks the policy as it is now."""

    def __init__(self, gate: KitPolicyGate) -> None:
        self._gate = gate

    @property
    def allowed(self) -> bool:
        return self._gate._policy.progress


class _KitTrackingGate(TrackingGate):
    """Tracks where the policy says when a script joins a job."""

    def __init__(self, gate: KitPolicyGate) -> None:
        self._gate = gate
        self._tracking: SiteTracking | None = None

    def begin(self, job: Settings) -> None:
        if targets := self._gate._policy.track:
            from fl_adapters.environments.tracking.site import SiteTracking

            with self._gate.refusals.recording("track"):
                self._tracking = SiteTracking(targets, self._gate.identity, job)

    def add(self, round: int, metrics: Mapping[str, float | Summary]) -> None:
        if self._tracking is not None:
            self._tracking.add(round, metrics)

    def close(self, folder: Path, *, early: bool) -> None:
        tracking, self._tracking = self._tracking, None
        if tracking is not None:
            tracking.close(folder, early=early)


def policy_gate_of(kit: Kit) -> PolicyGate:
    """Return the policy gate of a site: that of its startup kit, or one that allows everything in a simulation."""
    if not kit.credentials:
        return PolicyGate()
    gate = KitPolicyGate(Path(kit.credentials), Path(kit.run).parent if kit.supervised else None)
    gate.refusals.job = kit.job  # until the server has said which job it is
    return gate
