"""The policy of a site: which jobs it joins, what may leave it, and a record of both in its audit log."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fl_adapters.participant.kit import Kit
from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.client.job_settings import run_settings
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.filters import check_repeatable
from fl_runtime.filters.ledger import BudgetLimit, PrivacyBudget
from fl_runtime.filters.server import applied_filters
from fl_runtime.trainings import job_of
from fl_runtime.types import CohortRules, Report, RunSettings, Settings, Task, Terms, Update
from fl_runtime.wire.names import Facts, Names

if TYPE_CHECKING:  # these need `cryptography`, which the base install does not bring
    from fl_runtime.trust.approval import Decision
    from fl_runtime.trust.audit import AuditLog, Witness
    from fl_runtime.trust.identity import Identity
    from fl_runtime.trust.policy import Policy, PolicyFile
    from fl_runtime.trust.stream_identity import StreamIdentity

_ADAPTERS = {"transformers": "hf"}  # framework -> name of its adapter, if they differ
_WITHHELD_REASON = "it left; the reason stays in this site's own log"


@dataclass(frozen=True)
class LeaveReason:
    """Why a site leaves its run: the whole text, and the part of it that holds nothing of the site's data.

    Attributes:
        text: The whole reason. It may quote data, as the text of an exception does.
        public: What may leave the site whatever its policy says.
        error: The exception that is the reason, or None.
    """

    text: str
    public: str = _WITHHELD_REASON
    error: BaseException | None = None

    @classmethod
    def own(cls, sentence: str) -> LeaveReason:
        """Return a reason that may leave every site.

        Args:
            sentence: A sentence of fl-adapters or of an adapter, without any value of the user's.

        Returns:
            The reason.
        """
        return cls(sentence, sentence)

    @classmethod
    def of(cls, reason: str | BaseException | LeaveReason) -> LeaveReason:
        """Return a reason in this form.

        Args:
            reason: A reason; an exception, of which the name of its class is public; or a text, of which nothing is.

        Returns:
            The reason.
        """
        if isinstance(reason, LeaveReason):
            return reason
        if isinstance(reason, BaseException):
            kind = type(reason).__name__
            return cls(f"{kind}: {reason}", f"{kind} (its text stays in this site's own log)", reason)
        return cls(reason)


class CohortGate:
    """Asked of how many sites' updates models are made. This class allows every number, as a simulation does."""

    @property
    def rules(self) -> CohortRules:
        """What the policy asks of every aggregate, as the server is told."""
        return CohortRules()

    def check(self, task: Task) -> None:
        """Check of how many updates the model of a task is made, and how many sites take part in its round."""


class PolicyGate:
    """Asked before anything leaves a site. This class allows everything, as a simulation does.

    `KitPolicyGate` enforces the policy of a startup kit.

    Attributes:
        cohort: Asked of how many sites' updates models are made.
    """

    cohort: CohortGate = CohortGate()

    def check_join(self, job: Settings, framework: str) -> None:
        """Check whether this site may take part in the job with this framework."""

    def check_handshake(self, names: Sequence[str], terms: Terms) -> None:
        """Check whether tensors of these names may travel, under the terms that the script proposes."""

    def check_names(self, names: Sequence[str], round: int, *, initial: bool) -> None:
        """Check whether tensors of these names may travel now. Called before filters, which may rename tensors.

        Args:
            names: Names of the tensors.
            round: Round of the task that they answer, for the audit log.
            initial: Whether they are this site's own weights for the initial model.
        """

    def visible_facts(self, facts: Facts) -> Facts:
        """Return what the site declares at the handshake, with the entries of lists kept back if the policy says so."""
        return facts

    def visible_software(self, info: Mapping[str, str]) -> Mapping[str, str]:
        """Return the part of `info` on this site's software that the server may see."""
        return info

    def record_task(self, task: Task) -> bool:
        """Record an arriving task. Return whether `filters` or `budget` may have changed since the last one."""
        return False

    def record_update(self, update: Update) -> None:
        """Check and record an update as the filters made it."""

    def record_report(self, report: Report) -> None:
        """Record a report as the filters made it."""

    def visible_reason(self, reason: LeaveReason) -> str:
        """Return the part of a reason that the server and the other sites may see."""
        return reason.text

    def record_leaving(self, reason: LeaveReason, *, early: bool) -> str:
        """Record that the site leaves. Return the reason as the server may see it."""
        return self.visible_reason(reason)

    def stream_identity(self) -> StreamIdentity | None:
        """Return what proves this site's identity to other sites, or None if there are no certificates."""
        return None

    @property
    def filters(self) -> Sequence[Settings]:
        """The policy's filters, which run last on what leaves."""
        return ()

    @property
    def budget(self) -> BudgetLimit | None:
        """Upper limit of the privacy budget that filters may spend at this site, over all jobs."""
        return None


class KitPolicyGate(PolicyGate):
    """Enforces the policy file of a startup kit, and writes the site's audit log.

    The policy file is read again whenever it has changed. Every method raises PermissionDeniedError, which names the
    rule, for what the policy does not allow. A policy that cannot be read raises ConfigError, so nothing leaves.

    Attributes:
        identity: Identity of the site, from its certificate.
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
        self._jobs = jobs or folder / "jobs"
        self._audit: AuditLog = audit or AuditLog(folder, folder)
        self._job = ""
        self._lists: list[str] = []  # names of the lists that the site declares
        self._strategy: str | None = None  # the job's, if it names one
        self._settings: RunSettings | None = None  # of the job
        self._names: list[str] = []  # of the tensors that were named at the handshake
        self._refusal: PermissionDeniedError | None = None  # the last one; its text is the policy's, free of data
        try:
            self._file: PolicyFile = PolicyFile(kit.policy_file)
            if audit is None:
                self._audit.ship_to(self._file.current.syslog)
        except FederationError as error:
            self._audit.refused(self.identity, "read policy", error)
            raise
        self.cohort = _KitCohortGate(self)

    def check_join(self, job: Settings, framework: str) -> None:
        self._job = str(job["name"])
        with _RecordRefusals(self, "join"):
            self._check_job(job)
            self._check_approval(job)
            self._policy.check_adapter(_ADAPTERS.get(framework, framework), self.identity)
        self._audit.write("joined", self.identity, job=self._job, submitted_by=str(job.get("submitted_by", "")))

    def check_job(self, job: Settings) -> None:
        """Check and record whether this site may run a job, before its command is started.

        Args:
            job: Settings of the job.

        Raises:
            PermissionDeniedError: The policy does not allow the job.
        """
        self._job = str(job["name"])
        with _RecordRefusals(self, "run"):
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
        with _RecordRefusals(self, "register"):
            self._policy.check_names(names, self.identity)
            if self._strategy is None and self._settings is not None:  # the script chooses it
                for refusal in _strategy_refusals(self._policy, self.identity, self._settings, terms.strategy):
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
        self._audit.write("handshake", self.identity, job=self._job, **facts)
        return visible

    def record_task(self, task: Task) -> bool:
        self._audit.write(f"task: {task.kind}", job=task.job, round=task.round, version=task.version)
        with _RecordRefusals(self, "read policy", round=task.round):
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
        with _RecordRefusals(self, "send update", round=round):
            self._policy.check_names(names, self.identity)
            if initial:
                self._policy.check_initial(self.identity)

    def record_update(self, update: Update) -> None:
        arrays = (*update.arrays.values(), *update.extras.values())
        size = sum(array.nbytes for array in arrays)
        with _RecordRefusals(self, "send update", round=update.round):
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
            "report", self.identity, job=self._job, version=report.version, metrics=metrics, num_examples=examples
        )

    def visible_reason(self, reason: LeaveReason) -> str:
        if self._policy.reasons:
            return reason.text
        if reason.error is not None and reason.error is self._refusal:
            return self._refusal.what
        return reason.public

    def record_leaving(self, reason: LeaveReason, *, early: bool) -> str:
        visible = self.visible_reason(reason)
        self._audit.write("left", self.identity, job=self._job, reason=reason.text, told=visible, early=early)
        return visible

    def stream_identity(self) -> StreamIdentity:
        from fl_runtime.trust.stream_identity import StreamIdentity

        self._audit.write("stream", self.identity, job=self._job)
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
        with _RecordRefusals(self, "run"):
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
        file = _acquire_slot(self._file.path.parent, most)
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
        return self._gate._policy.cohort.rules

    def check(self, task: Task) -> None:
        with _RecordRefusals(self._gate, f"task: {task.kind}", round=task.round):
            self._gate._policy.cohort.check_task(task, self._gate.identity)


class _RecordRefusals:
    """Writes refusals in a `with` block to the audit log."""

    def __init__(self, gate: KitPolicyGate, action: str, **facts: Any) -> None:
        self._gate, self._action, self._facts = gate, action, facts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FederationError):
            gate = self._gate
            if isinstance(error, PermissionDeniedError):
                gate._refusal = error
            gate._audit.refused(gate.identity, self._action, error, job=gate._job, **self._facts)


def job_refusals(
    policy: Policy, site: Identity, job: Settings, *, submitter_known: bool = True
) -> Iterator[FederationError]:
    """Yield what in a policy, of all that needs no script to decide, refuses a job: one error for each rule.

    Args:
        policy: The policy.
        site: The site whose policy it is.
        job: Settings of the job.
        submitter_known: Whether the settings say who submits the job; otherwise that is not checked.
    """
    from fl_runtime.trust.identity import Identity

    settings, cohort = run_settings(job), policy.cohort
    uri = str(job.get("submitted_by", ""))
    if submitter_known:
        submitter = Identity.from_uri(uri) if uri else None
        yield from _refused(lambda: policy.check_submitter(settings.name, submitter, site))
    for check in (cohort.check_cross_site, cohort.check_sampling, cohort.check_site_weights, cohort.check_sites):
        yield from _refused(partial(check, settings, site))
    if settings.strategy is not None:
        yield from _strategy_refusals(policy, site, settings, settings.strategy)
    if settings.exact_restart:
        yield from _refused(lambda: check_repeatable(policy.filters))


def _strategy_refusals(policy: Policy, site: Identity, job: RunSettings, strategy: str) -> Iterator[FederationError]:
    """Yield what in a policy refuses a strategy: its name, or of how few updates it makes a model."""
    yield from _refused(lambda: policy.check_strategy(job.name, strategy, site))
    yield from _refused(lambda: policy.cohort.check_strategy(job, make_strategy(strategy), site))


def _refused(check: Callable[[], None]) -> Iterator[FederationError]:
    """Yield the error that a check raises, if any."""
    try:
        check()
    except FederationError as error:
        yield error


def _acquire_slot(folder: Path, most: int) -> IO[bytes] | None:
    """Lock one of `most` files, until it is closed. None if all are locked."""
    for number in range(most):
        file = open(folder / f"process-{number}.lock", "wb")  # noqa: SIM115 (open for as long as the slot is occupied)
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            file.close()
    return None


def policy_gate_of(kit: Kit) -> PolicyGate:
    """Return the policy gate of a site: that of its startup kit, or one that allows everything in a simulation."""
    if not kit.credentials:
        return PolicyGate()
    return KitPolicyGate(Path(kit.credentials), Path(kit.run).parent if kit.supervised else None)
