"""What a site lets leave it: nothing to say in a simulation; in a federation its policy, and everything on record."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.errors import ConfigError, FederationError, PermissionDeniedError
from fl_runtime.filters.ledger import Budget, Limit
from fl_runtime.filters.server import what_ran
from fl_runtime.types import Report, Settings, Task, Terms, Update

if TYPE_CHECKING:
    from fl_adapters.participant.kit import Kit
    from fl_runtime.trust.audit import AuditLog
    from fl_runtime.trust.policy import Policy, PolicyFile
    from fl_runtime.trust.stream_identity import StreamIdentity

_ADAPTERS = {"transformers": "hf"}  # framework -> adapter, where they differ
_REASON = "it left"


class SiteRules:
    """Lets everything pass. The session asks before anything leaves; `GovernedSite` answers for a federation."""

    def joined(self, settings: Settings, framework: str) -> None:
        """May this site take part in this job, with this framework?"""

    def handshake(self, names: Sequence[str], terms: Terms) -> None:
        """May these tensors travel, under these terms?"""

    def info(self, info: Mapping[str, str]) -> Mapping[str, str]:
        """What is said of this site's software."""
        return info

    def received(self, task: Task) -> bool:
        """A task has come. True: `filters` or `budget` may have changed."""
        return False

    @property
    def filters(self) -> Sequence[Settings]:
        """Filters that run last on what leaves, as they stand now."""
        return ()

    @property
    def budget(self) -> Limit | None:
        """The most that filters with a ledger may spend here, over all jobs."""
        return None

    def may_travel(self, names: Sequence[str], round: int) -> None:
        """May these tensors travel now? Asked before the filters, which may give them other names."""

    def outgoing(self, update: Update) -> None:
        """May this update leave, as the filters have made it?"""

    def report(self, report: Report) -> None:
        """May this score leave, as the filters have made it?"""

    def leaving(self, reason: str, *, early: bool) -> str:
        """The reason as it may be told."""
        return reason

    def stream_identity(self) -> StreamIdentity | None:
        """Who this site is to other sites; None where nobody has certificates."""
        return None


class GovernedSite(SiteRules):
    """The policy file of a startup kit, read again whenever it has changed, and the site's audit log.

    Every method raises PermissionDeniedError, naming the rule, for what the policy does not allow, and ConfigError
    for a policy that cannot be read: then nothing leaves.
    """

    def __init__(self, folder: Path) -> None:
        from fl_runtime.trust.audit import AuditLog
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.policy import PolicyFile

        kit = read_kit(folder, kind="site")
        self.identity = kit.identity
        self._audit: AuditLog = AuditLog(folder, folder)
        self._job = ""
        self._strategy: str | None = None  # the job's, where it names one
        try:
            self._file: PolicyFile = PolicyFile(kit.policy_file)
        except FederationError as error:
            self._audit.refused(self.identity, "read policy", error)
            raise

    def joined(self, settings: Settings, framework: str) -> None:
        self._job = str(settings["name"])
        with _Recorded(self, "join"):
            self.check_job(settings)
            self._policy.check_adapter(_ADAPTERS.get(framework, framework), self.identity)
        self._audit.write("joined", self.identity, job=self._job, submitted_by=str(settings.get("submitted_by", "")))

    def check(self, settings: Settings) -> None:
        """The part of `joined` that needs the job alone, on record; for a job whose command has not started."""
        self._job = str(settings["name"])
        with _Recorded(self, "run"):
            self._file.refresh()
            self.check_job(settings)

    def check_job(self, settings: Settings) -> None:
        from fl_runtime.trust.identity import Identity

        by = str(settings.get("submitted_by", ""))
        submitter = Identity.from_uri(by) if by else None
        self._policy.check_submitter(str(settings["name"]), submitter, self.identity)
        if settings.get("cross_site"):
            self._policy.check_cross_site(str(settings["name"]), self.identity)
        self._strategy = settings.get("strategy")
        if self._strategy is not None:
            self._policy.check_strategy(str(settings["name"]), self._strategy, self.identity)

    def handshake(self, names: Sequence[str], terms: Terms) -> None:
        with _Recorded(self, "register"):
            self._policy.check_names(names, self.identity)
            if self._strategy is None:  # the job leaves it to the script
                self._policy.check_strategy(self._job, terms.strategy, self.identity)

    def info(self, info: Mapping[str, str]) -> Mapping[str, str]:
        return info if self._policy.info else {}

    def received(self, task: Task) -> bool:
        self._audit.write(f"task: {task.kind}", job=task.job, round=task.round, version=task.version)
        with _Recorded(self, "read policy", round=task.round):
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
    def budget(self) -> Limit | None:
        found = self._policy.privacy
        return Limit(Budget(found.epsilon, found.delta), self.identity.name, all_jobs=True) if found else None

    def may_travel(self, names: Sequence[str], round: int) -> None:
        with _Recorded(self, "send update", round=round):
            self._policy.check_names(names, self.identity)
            if round == 0:
                self._policy.check_initial(self.identity)

    def outgoing(self, update: Update) -> None:
        size = sum(array.nbytes for array in (*update.arrays.values(), *update.extras.values()))
        with _Recorded(self, "send update", round=update.round):
            self._policy.check_bytes(size, self.identity)
        self._audit.write(
            "update",
            self.identity,
            job=update.job,
            round=update.round,
            tensors=len(update.arrays) + len(update.extras),
            bytes=size,
            num_examples=update.num_examples,
            metrics=dict(update.metrics),
            filters=[str(item.get("name")) for item in what_ran(update.encoding)],
        )

    def report(self, report: Report) -> None:
        metrics, examples = plain(report.metrics), report.num_examples
        self._audit.write("report", self.identity, job=self._job, metrics=metrics, num_examples=examples)

    def leaving(self, reason: str, *, early: bool) -> str:
        told = reason if self._policy.reasons or not early else _REASON
        self._audit.write("left", self.identity, job=self._job, reason=reason, told=told, early=early)
        return told

    def stream_identity(self) -> StreamIdentity:
        from fl_runtime.trust.stream_identity import StreamIdentity

        return StreamIdentity(self._file.path.parent)  # anew: a certificate may be renewed in the middle of a run

    # -- for `fl-adapters run` --------------------------------------------------------------------------------

    def record(self, action: str, **facts: Any) -> None:
        """Put something that this site did on record."""
        self._audit.write(action, self.identity, **facts)

    def app_command(self, app: str) -> str:
        """The local command that the policy names for a job's app. ConfigError where it names none."""
        if app not in self._policy.apps:
            raise ConfigError(
                f"nothing says what to run for the app {app!r}",
                where=str(self._file.path),
                fix="give the command after --, or name it there under `apps`",
            )
        return self._policy.apps[app]

    def environment(self) -> dict[str, str]:
        """What the command sees of this machine."""
        gpus = self._policy.resources.gpus
        return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}

    @contextmanager
    def one_of_the_processes(self) -> Iterator[None]:
        """Within: this is one of the commands that may run here at a time. Refused where there are enough."""
        most = self._policy.resources.processes
        with _Recorded(self, "run"):
            place = None if most is None else _place(self._file.path.parent, most, self.identity)
        try:
            yield
        finally:
            if place is not None:
                place.close()

    @property
    def _policy(self) -> Policy:
        return self._file.current


class _Recorded:
    """Puts what is refused in its block on record."""

    def __init__(self, site: GovernedSite, action: str, **facts: Any) -> None:
        self._site, self._action, self._facts = site, action, facts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FederationError):
            site = self._site
            site._audit.refused(site.identity, self._action, error, job=site._job, **self._facts)


def _place(folder: Path, most: int, identity: object) -> IO[bytes]:
    """One of `most` lock files, held as long as it is open. PermissionDeniedError when all are taken."""
    for number in range(most):
        file = open(folder / f"process-{number}.lock", "wb")  # noqa: SIM115 (open for as long as the place is taken)
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            file.close()
    raise PermissionDeniedError(
        f"{identity} may not run another command",
        where=f"rule resources: processes: {most} (the site's policy.yml)",
        fix="wait until one has ended, or raise it there",
    )


def rules_of(kit: Kit) -> SiteRules:
    """The rules of the site whose kit this is."""
    return GovernedSite(Path(kit.credentials)) if kit.credentials else SiteRules()
