"""A site's policy: what may leave the site, and whose jobs it takes part in. It overrules every job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fl_runtime.errors import ConfigError
from fl_runtime.trust.files import check_unwritable
from fl_runtime.trust.identity import Identity, Role
from fl_runtime.trust.policy.cohort import CohortPolicy
from fl_runtime.trust.policy.disclosure import DisclosurePolicy
from fl_runtime.trust.policy.files import FilesPolicy
from fl_runtime.trust.policy.refusal import denied
from fl_runtime.trust.policy.statistics import StatisticsPolicy
from fl_runtime.trust.project import findings
from fl_runtime.types import CohortRules, RunSettings
from fl_runtime.yaml_files import read_yaml

ADAPTERS_ONLY = ("*lora_*", "*ia3_*", "*prompt_encoder*", "*prompt_embeddings*", "*adapter*", "*modules_to_save*")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Submitters(_Part):
    """Whose jobs a site takes part in. A submitter must satisfy every field that is not None.

    Attributes:
        roles: Accepted roles of admins; None accepts every role.
        organisations: Accepted organisations, or "own" for the site's own organisation only; None accepts every one.
        names: Accepted names of admins; None accepts everyone.
    """

    roles: tuple[Role, ...] | None = None
    organisations: Literal["own"] | tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None

    @property
    def limits(self) -> bool:
        """Whether any job may be refused for its submitter."""
        return any(field is not None for field in (self.roles, self.organisations, self.names))


class Privacy(_Part):
    """Largest total privacy cost over all jobs: of this site's filters, which protect its whole updates, and apart from
    that of DP-SGD, which protects single records.

    Attributes:
        epsilon: Greater than 0.
        delta: Between 0 and 1, both excluded.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class Resources(_Part):
    """What the local commands of a site may use.

    Attributes:
        gpus: Devices that commands see (`CUDA_VISIBLE_DEVICES`); None does not change the environment. A site daemon
            divides them among the commands that it runs at a time.
        processes: Largest number of commands at a time, at least 1. None does not limit `fl-adapters run`; a site
            daemon then runs one at a time.
        memory_gb: Memory for the jobs of a site daemon together, in GiB; None for this machine's. Jobs that say what
            they use wait until so much is free. Nothing limits what they do use.
    """

    gpus: tuple[str, ...] | None = None
    processes: int | None = Field(default=None, ge=1)
    memory_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class EvaluationRules(_Part):
    """What a site allows when given models are scored on its data.

    Attributes:
        allowed: Whether it takes part. In the file, `evaluation: false` says that it does not.
        smallest_cell: Fewest rows behind any number of a subgroup that leaves the site, except 0.
    """

    allowed: bool = True
    smallest_cell: int = Field(default=10, ge=1)


class Policy(_Part):
    """The contents of policy.yml. The defaults keep texts of errors and a model's small files, and limit no more.

    Attributes:
        filters: Filters that always run on updates, after the job's own, in order; each with "name" and arguments.
        exchange: Name patterns (`fnmatch`) of the tensors that may leave the site. "adapters" in the file stands for
            those of PEFT adapters. None allows all.
        initial: Whether the site's weights may become the initial global model. None allows those with which its script
            begins, but no result of an earlier job that fewer than `min_cohort` sites have trained.
        min_cohort: Least number of sites whose updates are in every model that the site takes part in.
        max_share: Largest share of one site in the weights of such a model; None sets no cap.
        site_weights: Largest ratio between the factors of two sites in a job's `site_weights`; None accepts every one.
        fraction: Smallest `fraction` of a job; None accepts every one.
        cross_site: Whether the site takes part in jobs in which other sites evaluate its model. None: if `min_cohort`
            is 1.
        swarm: Whether another site may get the site's updates, to average them. None: if `min_cohort` is 1.
        trees: Whether other sites may get the site's own trees or gradient histograms. None: if `min_cohort` is 1.
        site_metrics: Whether others may see the metrics and the number of examples of this site alone.
        evaluation: What the site allows when given models are scored on its data.
        progress: Whether the server is told how far the site is within a round, and for how long it has trained.
        share_files: Name patterns (`fnmatch`) of the small files beside a model, such as config.json and a tokenizer,
            that may go to the server with the final model. In the file, `true` stands for all and `false` for none.
        statistics: What statistics may tell of the site's rows. In the file, `false` stands for nothing.
        max_round_bytes: Largest update of one round, in bytes; None does not limit it.
        reasons: Whether the site may send the text of an error or of another reason when it leaves. It may quote data.
        info: Whether the site may send the versions of its software.
        names: Whether entries of lists that sites must share, such as labels, may leave the site beside digests.
        privacy: Privacy budget; None sets no limit.
        strategies: Accepted strategies, by name or full text; None accepts every one.
        adapters: Accepted adapters by short name, such as "hf"; None accepts every one.
        submitters: Whose jobs the site takes part in.
        approve: "ask" holds every job until somebody at the site approves it; None holds none.
        apps: A job's `app` -> the local command that runs it.
        data: Where the site's own data lie, which its scripts are told: an absolute path or an address; or a mapping of
            a job's `app` to it. None tells them nothing.
        resources: What local commands may use.
        secure_sum: "required" refuses jobs in which the server sees this site's own updates; None accepts both.
        sum_threshold: Share of the sites around this one that can open the masks of its update together, if it drops
            out of a secure sum; from 0.5 and below 1. None for 0.6.
        share_logs: Whether those who follow a job see the site daemon's own lines about it, such as that its script was
            started again. They never hold output of the script.
        track: Where the site's own machine tracks its own part in a job, such as "mlflow:URI". Read at the start.
        syslog: Address of a syslog server that gets every line of the audit log; "" for none. Read at the start.
    """

    filters: tuple[dict[str, Any], ...] = ()
    exchange: tuple[str, ...] | None = None
    initial: bool | None = None
    min_cohort: int = Field(default=1, ge=1)
    max_share: float | None = Field(default=None, gt=0, le=1)
    site_weights: float | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    cross_site: bool | None = None
    swarm: bool | None = None
    trees: bool | None = None
    site_metrics: bool = True
    evaluation: EvaluationRules = EvaluationRules()
    progress: bool = True
    share_files: tuple[str, ...] = ()
    statistics: StatisticsPolicy = StatisticsPolicy()
    max_round_bytes: int | None = Field(default=None, ge=0)
    reasons: bool = False
    info: bool = True
    names: bool = True
    privacy: Privacy | None = None
    strategies: tuple[str, ...] | None = None
    adapters: tuple[str, ...] | None = None
    submitters: Submitters = Submitters()
    approve: Literal["ask"] | None = None
    apps: Mapping[str, str] = Field(default_factory=dict)
    data: str | Mapping[str, str] | None = None
    resources: Resources = Resources()
    secure_sum: Literal["required"] | None = None
    sum_threshold: float | None = Field(default=None, ge=0.5, lt=1)
    share_logs: bool = True
    track: tuple[str, ...] = ()
    syslog: str = ""

    @field_validator("track", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("data")
    @classmethod
    def _absolute(cls, value: str | Mapping[str, str] | None) -> str | Mapping[str, str] | None:
        for place in (value,) if isinstance(value, str) else (value or {}).values():
            if not place.startswith("/") and "://" not in place:
                raise ValueError(f"{place!r} is not an absolute path: commands do not run in this folder")
        return value

    @field_validator("exchange", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return ADAPTERS_ONLY if value == "adapters" else value

    @field_validator("share_files", mode="before")
    @classmethod
    def _all_or_none(cls, value: Any) -> Any:
        return {True: ("*",), False: ()}[value] if isinstance(value, bool) else value

    def data_for(self, app: str) -> str | None:
        """Return where this site's data for an app lie, or None if the rules do not say."""
        return self.data.get(app) if isinstance(self.data, Mapping) else self.data

    @field_validator("statistics", "evaluation", mode="before")
    @classmethod
    def _allowed_or_not(cls, value: Any) -> Any:
        return {"allowed": value} if isinstance(value, bool) else value

    @property
    def files(self) -> FilesPolicy:
        """The rules on the small files beside a model."""
        return FilesPolicy(self.share_files, self.names, self.max_round_bytes)

    @property
    def cohort(self) -> CohortPolicy:
        """The rules on who must be in an aggregate with this site."""
        return CohortPolicy(self.min_cohort, self.max_share, self.site_weights, self.fraction)

    @property
    def disclosure(self) -> DisclosurePolicy:
        """The rules on what other sites get or see of this site alone."""
        return DisclosurePolicy(
            self.min_cohort, self.initial, self.cross_site, self.swarm, self.trees, self.site_metrics
        )

    @property
    def rules(self) -> CohortRules:
        """The part of these rules that the server keeps to, as it is told at the handshake."""
        own = self.disclosure
        return CohortRules(self.min_cohort, self.max_share, own.own_model_stays, own.stays)

    def check_secure_sum(self, job: RunSettings, site: Identity) -> None:
        """Check that the server sees this site's updates in sums alone, if the rules ask for that.

        Args:
            job: Settings of the job.
            site: This site.

        Raises:
            PermissionDeniedError: It would see them.
        """
        if self.secure_sum == "required" and not job.secure_sum:
            action = f"take part in {job.name}, in which the server sees the updates of single sites"
            raise denied(site, action, "secure_sum: required", fix="add `secure_sum: true` to the job")

    # -- may this site take part? ----------------------------------------------------------------------------

    def check_strategy(self, job: str, strategy: str, site: Identity) -> None:
        """Check that the site takes part in jobs with this strategy.

        Args:
            job: Name of the job, for the message.
            strategy: The strategy's text, such as "fedadam:lr=0.1".
            site: This site.

        Raises:
            PermissionDeniedError: If it does not.
        """
        kind = strategy.partition(":")[0]
        if self.strategies is not None and kind not in self.strategies and strategy not in self.strategies:
            raise denied(site, f"take part in {job}", f"strategies: {kind} is not one of {_listed(self.strategies)}")

    def check_submitter(self, job: str, submitter: Identity | None, site: Identity) -> None:
        """Check that the site takes part in jobs of this submitter.

        Args:
            job: Name of the job, for the message.
            submitter: Who submitted it; None if unknown.
            site: This site.

        Raises:
            PermissionDeniedError: If it does not.
        """
        rules = self.submitters
        owners = (site.organisation,) if rules.organisations == "own" else rules.organisations
        for field, allowed in (("role", rules.roles), ("organisation", owners), ("name", rules.names)):
            value = getattr(submitter, field) if submitter else "unknown"
            if allowed is not None and value not in allowed:
                person = submitter or "an unknown person"
                rule = f"submitters: {field} {value} is not one of {_listed(allowed)}"
                raise denied(site, f"take part in {job}, submitted by {person}", rule)

    def check_approval(self, job: str, site: Identity, *, approved: bool) -> None:
        """Check that somebody at the site has approved a job, if the policy asks for that.

        Args:
            job: Name of the job, for the message.
            site: This site.
            approved: Whether it was approved with its present settings.

        Raises:
            PermissionDeniedError: If nobody has.
        """
        if self.approve == "ask" and not approved:
            raise denied(site, f"take part in {job}, which nobody at the site has approved", "approve: ask")

    def check_adapter(self, framework: str, site: Identity) -> None:
        """Check that this adapter may be used at the site.

        Args:
            framework: The adapter's short name, such as "hf".
            site: This site.

        Raises:
            PermissionDeniedError: If it may not.
        """
        if self.adapters is not None and framework not in self.adapters:
            rule = f"adapters: {framework} is not one of {_listed(self.adapters)}"
            raise denied(site, f"use the adapter {framework}", rule)

    # -- may this leave? -------------------------------------------------------------------------------------

    def check_names(self, names: Iterable[str], site: Identity) -> None:
        """Check that these tensors may leave the site.

        Args:
            names: Names of tensors.
            site: This site.

        Raises:
            PermissionDeniedError: If one may not; the message names up to five.
        """
        if self.exchange is None:
            return
        refused = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.exchange)]
        if refused:
            listed = f"{_listed(refused[:5])}{f' and {len(refused) - 5} more' if len(refused) > 5 else ''}"
            raise denied(site, f"send {listed}", f"exchange: {_listed(self.exchange)}")

    def check_bytes(self, size_bytes: int, site: Identity) -> None:
        """Check the size of an update against `max_round_bytes`. Raises PermissionDeniedError if it is too large."""
        if self.max_round_bytes is not None and size_bytes > self.max_round_bytes:
            rule = f"max_round_bytes: {self.max_round_bytes}"
            raise denied(site, f"send an update of {size_bytes} bytes", rule)


class PolicyFile:
    """A policy that is read again when its file changes. If the file cannot be read, nothing may leave the site.

    Args:
        path: The policy file.

    Attributes:
        path: The policy file.
        current: The policy as last read.

    Raises:
        ConfigError: If the file cannot be read or is not a valid policy.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self.current = Policy()
        self.refresh()

    def refresh(self) -> bool:
        """Read the file again if it has changed.

        Returns:
            Whether it had changed.

        Raises:
            ConfigError: If the file cannot be read or is not a valid policy.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise ConfigError(
                f"the site's policy cannot be read: {error.strerror}",
                where=str(self.path),
                fix="restore the file: without a policy nothing leaves the site. An empty file limits nothing",
            ) from None
        check_unwritable(self.path)  # each time: its mode may have changed, or that of a folder
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return False
        self.current = read_policy(self.path)
        self._stamp = stamp
        return True


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Args:
        path: A YAML file; an empty one limits nothing.

    Returns:
        The policy.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or has unknown or invalid fields.
    """
    check_unwritable(path)
    try:
        return Policy.model_validate(read_yaml(path, "the policy") or {})
    except ValidationError as error:
        fix = "the settings are: " + ", ".join(Policy.model_fields)
        raise ConfigError(findings(error), where=str(path), fix=fix) from None


def _listed(values: Iterable[str]) -> str:
    return ", ".join(values)
