"""The site's policy: what may leave it and who may ask it to work, whatever the job says. A YAML file to edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fl_runtime.errors import ConfigError, PermissionDeniedError
from fl_runtime.trust.identity import Identity, Role
from fl_runtime.trust.project import findings

POLICY_FILE = "policy.yml"
ADAPTERS_ONLY = ("*lora_*", "*ia3_*", "*prompt_encoder*", "*prompt_embeddings*", "*adapter*", "*modules_to_save*")

TEMPLATE = """\
# What may leave this site, and who may ask it to work. It wins over whatever a job says. This file is read again when
# it changes and takes effect with the next round. A line with # in front is an example, and off.

# Filters that always run on updates, after the job's own, in this order.
filters: []
#  - {name: ExcludeVars, names: ["head.*"]}
#  - {name: AllowMetrics, names: [loss, train_loss]}
#  - {name: RoundMetrics, decimals: 2}
#  - {name: Examples, equal: true}

# Names (patterns) of the tensors that may travel; "adapters" stands for those of PEFT adapters.
# exchange: adapters
# exchange: ["encoder.*"]

# Whether this site's own weights may be those that the run begins with. Filters do not reach them.
# initial: false

# Whether this site takes part in jobs with cross_site, where the others evaluate its own model on their data.
# cross_site: false

# The largest update of one round, in bytes.
# max_round_bytes: 100_000_000

# Why this site leaves, and the versions of its software, as free text.
# reasons: false
# info: false

# The budget that filters with a privacy ledger must keep.
# privacy: {epsilon: 8.0, delta: 1.0e-5}

# Strategies and adapters that may be used.
# strategies: [fedavg]
# adapters: [hf, lightning]

# Whose jobs this site takes part in.
# submitters: {roles: [lead, project-admin], organisations: own}

# The local command for each job's `app`, for `fl-adapters run` without a command.
# apps: {tumour: "python /opt/train/train_federated.py"}

# resources: {gpus: ["0"], processes: 1}
"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Submitters(_Part):
    """Whose jobs count; None and empty do not limit. organisations: names, or "own": the site's own alone."""

    roles: tuple[Role, ...] | None = None
    organisations: Literal["own"] | tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None


class Privacy(_Part):
    """The most that may be spent, in total. Kept by the filters that have a ledger."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class Resources(_Part):
    """gpus: the devices that commands see; None leaves that alone. processes: commands at a time."""

    gpus: tuple[str, ...] | None = None
    processes: int | None = Field(default=None, ge=1)


class Policy(_Part):
    """What the file says. None does not limit."""

    filters: tuple[dict[str, Any], ...] = ()
    exchange: tuple[str, ...] | None = None
    initial: bool = True
    cross_site: bool = True
    max_round_bytes: int | None = Field(default=None, ge=0)
    reasons: bool = True
    info: bool = True
    privacy: Privacy | None = None
    strategies: tuple[str, ...] | None = None
    adapters: tuple[str, ...] | None = None
    submitters: Submitters = Submitters()
    apps: Mapping[str, str] = Field(default_factory=dict)
    resources: Resources = Resources()

    @field_validator("exchange", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return ADAPTERS_ONLY if value == "adapters" else value

    # -- may this site take part? ----------------------------------------------------------------------------

    def check_strategy(self, job: str, strategy: str, site: Identity) -> None:
        """PermissionDeniedError if this site does not take part in a job with this strategy (a spec, or its name)."""
        kind = strategy.partition(":")[0]
        if self.strategies is not None and kind not in self.strategies and strategy not in self.strategies:
            raise _denied(site, f"take part in {job}", f"strategies: {kind} is not one of {_listed(self.strategies)}")

    def check_cross_site(self, job: str, site: Identity) -> None:
        """PermissionDeniedError if this site's own model may not be handed to the others."""
        if not self.cross_site:
            raise _denied(
                site, f"take part in {job}, which hands every site's model to the others", "cross_site: false"
            )

    def check_submitter(self, job: str, submitter: Identity | None, site: Identity) -> None:
        """PermissionDeniedError if this site takes no part in jobs of theirs. submitter: None where nobody says."""
        rules = self.submitters
        owners = (site.organisation,) if rules.organisations == "own" else rules.organisations
        for field, allowed in (("role", rules.roles), ("organisation", owners), ("name", rules.names)):
            value = getattr(submitter, field) if submitter else "unknown"
            if allowed is not None and value not in allowed:
                by = submitter or "somebody unknown"
                rule = f"submitters: {field} {value} is not one of {_listed(allowed)}"
                raise _denied(site, f"take part in {job}, submitted by {by}", rule)

    def check_adapter(self, framework: str, site: Identity) -> None:
        """framework: the adapter's short name, such as hf."""
        if self.adapters is not None and framework not in self.adapters:
            rule = f"adapters: {framework} is not one of {_listed(self.adapters)}"
            raise _denied(site, f"use the adapter {framework}", rule)

    # -- may this leave? -------------------------------------------------------------------------------------

    def check_names(self, names: Iterable[str], site: Identity) -> None:
        """PermissionDeniedError naming the tensors that may not travel."""
        if self.exchange is None:
            return
        held = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.exchange)]
        if held:
            shown = f"{_listed(held[:5])}{f' and {len(held) - 5} more' if len(held) > 5 else ''}"
            raise _denied(site, f"send {shown}", f"exchange: {_listed(self.exchange)}")

    def check_initial(self, site: Identity) -> None:
        if not self.initial:
            raise _denied(site, "send the weights that the run begins with", "initial: false")

    def check_bytes(self, size_bytes: int, site: Identity) -> None:
        if self.max_round_bytes is not None and size_bytes > self.max_round_bytes:
            rule = f"max_round_bytes: {self.max_round_bytes}"
            raise _denied(site, f"send an update of {size_bytes} bytes", rule)


class PolicyFile:
    """A policy that is read again when its file has changed. A file that cannot be read lets nothing leave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self.current = Policy()
        self.refresh()

    def refresh(self) -> bool:
        """Read the file if it has changed since; True if it has. Raises ConfigError that says what is wrong."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise ConfigError(
                f"the site's policy cannot be read: {error.strerror}",
                where=str(self.path),
                fix="nothing leaves the site without one; an empty file limits nothing",
            ) from None
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self._stamp:
            return False
        self.current = read_policy(self.path)
        self._stamp = stamp
        return True


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file; an empty one limits nothing. Raises ConfigError."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Policy.model_validate(fields or {})
    except OSError as error:
        raise ConfigError(
            f"the policy cannot be read: {error.strerror}", where=str(path), fix="check the file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy is not YAML: {error}", where=str(path), fix="correct it there") from None
    except ValidationError as error:
        fix = "the settings are: " + ", ".join(Policy.model_fields)
        raise ConfigError(findings(error), where=str(path), fix=fix) from None


def _denied(site: Identity, action: str, rule: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{site} may not {action}",
        where=f"rule {rule} (the site's {POLICY_FILE})",
        fix="the site's policy decides; change the job, or have the site change its policy",
    )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(values)
