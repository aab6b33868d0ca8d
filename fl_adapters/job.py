"""`Job`: the settings of a federated run, as Python or as YAML. Settings, never code."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_adapters.participant.options import Options
from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.spec import Described
from fl_runtime.errors import ConfigError
from fl_runtime.filters import check_cross_site, check_filters, check_repeatable
from fl_runtime.types import RunSettings

R_co = TypeVar("R_co", covariant=True)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = ("global", "local")  # what history.csv and a script that runs alone call themselves


class Environment(Protocol[R_co]):
    """Where a job runs: `Simulation` on this machine."""

    def run(self, job: Job) -> R_co: ...


class Job(BaseModel):
    """One federated run. Frozen; every field is checked when it is made, and a bad one raises ConfigError.

    app: the script (or module) that every site runs. name: made from the app and the time unless given; names the
    folder `runs/<name>`. rounds: None leaves it to the trainer's own budget, which all sites must agree on.
    strategy: "fedavg", or with arguments "name:argument=value,...", or an object such as `FedAdam(lr=0.1)`, which is
    kept as that text; one that nobody chose gives way to what the script needs (the trees of XGBoost).
    sites: how many, or their names; None leaves it to the environment. fraction: how many of them take part in a round,
    drawn anew for each from `seed` and its number; the others wait. site_weights: factors of the weights of sites by
    name, 1 for those not named. min_sites: how many updates a round needs; None means every site's that takes part.
    deadline_s: a round ends after so many seconds with the updates that are there.
    rejoin_s: how long a site whose process or connection is gone is waited for before `min_sites` decides.
    durability: what is promised holds through the death of processes, or with "power" also of the machine: the server
    then waits for its disk before it acknowledges an update, closes a round, or leaves a result.
    late: "drop" an update that comes after its round, or "carry" it into the next.
    every, exchange, keep_local, optimizer_state: see the adapters' arguments; the script's own arguments win.
    initial: a safetensors file with the first global weights; None takes the first site's.
    best_metric, best_mode: which round is the best one; the script's own early stopping may say.
    patience, min_delta: the run ends when so many rounds have brought nothing better (by more than min_delta) in
    best_metric; None leaves it to the script's own early stopping.
    cross_site: after the last round every site scores the global model and what every site has sent last, which so
    reaches all the others.
    seed: of whatever the run draws.
    filters: what changes updates and models on their way, in order: a table each, with its name, its arguments and
    optionally `at`, its point (docs/filters.md).
    exact_restart: a site whose process dies and is started again goes on as if nothing had happened, to the bit; every
    round begins from random states of its own, made of `seed`, the site and the round (docs/restart.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = ""
    app: str = Field(min_length=1)
    rounds: int | None = Field(default=None, ge=1)
    strategy: str | Described = "fedavg"  # always text, once the job is made
    sites: int | tuple[str, ...] | None = None
    min_sites: int | None = Field(default=None, ge=1)
    cross_site: bool = False
    fraction: float = Field(default=1.0, gt=0, le=1)
    site_weights: dict[str, float] = Field(default_factory=dict)
    deadline_s: float = Field(default=86_400.0, gt=0, allow_inf_nan=False)
    rejoin_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    late: Literal["drop", "carry"] = "drop"
    durability: Literal["process", "power"] = "process"
    every: str | int | None = None
    exchange: str | tuple[str, ...] | None = None
    keep_local: tuple[str, ...] = ()
    optimizer_state: Literal["keep", "reset", "average"] | None = None
    filters: tuple[dict[str, Any], ...] = ()
    initial: str | None = None
    best_metric: str = Field(default="loss", min_length=1)
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = Field(default=None, ge=1)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0)
    exact_restart: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        if isinstance(data, cls):
            return data
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        strategy = fields.get("strategy")
        if isinstance(strategy, Described):
            fields["strategy"] = strategy.spec
        chosen = "name" in fields
        try:
            job = handler(fields if chosen else {**fields, "name": _name_for(str(fields.get("app", "job")))})
        except ValidationError as error:
            raise _explained(error) from None
        if not chosen:
            job.model_fields_set.discard("name")  # a name that nobody chose may get a number if it is taken
        _check(job)
        return job

    @classmethod
    def from_file(cls, path: str | PurePath, **given: Any) -> Job:
        """The job in a YAML file. given: fields that count in place of the file's. Raises ConfigError that names the
        file and the field."""
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"the job file cannot be read: {error.strerror or error}", where=str(path), fix="check the path"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"the job file is not YAML: {error}", where=str(path), fix="correct it there") from None
        if not isinstance(fields, dict):
            raise ConfigError(
                "the job file is not a table of settings",
                where=str(path),
                fix="write one setting per line, such as `rounds: 10`",
            )
        try:
            return cls(**{str(name): value for name, value in fields.items()} | given)
        except ConfigError as error:
            if set(error.where.split(", ")) <= given.keys():  # the file does not say that
                raise
            raise ConfigError(error.what, where=f"{path}: {error.where}".removesuffix(": "), fix=error.fix) from None

    def to_yaml(self) -> str:
        """The job as YAML: its name and app, and whatever differs from the defaults. `from_file` reads it back."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"name": self.name, "app": self.app, **changed}, sort_keys=False, allow_unicode=True)

    def run(self, environment: Environment[R_co]) -> R_co:
        """Run this job in `environment` and return its result. Raises FederationError if the run fails."""
        return environment.run(self)

    def settings(self, sites: Sequence[str]) -> RunSettings:
        """What the server and the sites need to know, for these sites. Raises ConfigError for what does not fit them:
        too many `min_sites`, `site_weights` of others, a strategy that needs more updates."""
        names = check_names(sites)
        fields = self.model_dump(exclude={"app", "sites", "min_sites"})
        fields |= dict.fromkeys({"strategy", "best_metric", "best_mode"} - self.model_fields_set)  # the script may say
        settings = RunSettings(sites=names, min_sites=self.min_sites or 0, app=self.app, **fields)
        most = settings.sites_per_round
        if settings.min_sites > most:
            raise ConfigError(
                f"min_sites is {settings.min_sites}, but the job has {len(names)} sites"
                + (f", of which {most} take part in a round" if most < len(names) else ""),
                where="min_sites",
                fix=f"lower min_sites to {most} at most, or add sites",
            )
        unknown = sorted(set(self.site_weights) - set(names))
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} has a weight and is no site of the job",
                where="site_weights",
                fix=f"its sites are: {', '.join(names)}",
            )
        settings = replace(settings, min_sites=self.min_sites or most)
        make_strategy(str(self.strategy)).check_sites(settings.min_sites)
        return settings


def site_names(sites: int | Sequence[str]) -> tuple[str, ...]:
    """`3` -> ("site-1", "site-2", "site-3"); names are checked and returned."""
    if isinstance(sites, int):
        if sites < 1:
            raise ConfigError(f"a federation of {sites} sites cannot run", where="sites", fix="give at least 1 site")
        return tuple(f"site-{number}" for number in range(1, sites + 1))
    return check_names(sites)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises ConfigError if there is none, one twice, or one that cannot name a folder."""
    if not names or isinstance(names, str):
        raise ConfigError(f"sites cannot be {names!r}", where="sites", fix="give a number of sites or a list of names")
    for name in names:
        _check_name(name, "sites")
        if name in _RESERVED:
            raise ConfigError(f"a site cannot be called {name!r}", where="sites", fix="choose another name")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigError(f"site {twice[0]!r} is listed twice", where="sites", fix="give every site its own name")
    return tuple(names)


def _check(job: Job) -> None:
    """What a field's type alone does not say."""
    _check_name(job.name, "name")
    strategy = make_strategy(str(job.strategy))
    if job.site_weights and not strategy.weighted:
        raise ConfigError(
            f"the strategy {job.strategy} knows no weights of sites",
            where="site_weights",
            fix="leave site_weights out of the job, or choose another strategy",
        )
    if job.fraction < 1 and strategy.content == "encoded":
        raise ConfigError(
            f"the strategy {job.strategy} needs all sites in every round",
            where="fraction",
            fix="leave fraction out of the job",
        )
    if strategy.relayed and job.late == "carry":
        raise ConfigError(
            f"under {job.strategy} the server has no update that it could carry into the next round",
            where="late",
            fix="leave late out of the job",
        )
    if strategy.buffer:
        for field, wanted in (
            ("fraction", job.fraction < 1),
            ("cross_site", job.cross_site),
            ("patience", job.patience),
        ):
            if wanted:
                raise ConfigError(
                    f"{field} needs rounds, and the strategy {job.strategy} has none",
                    where=field,
                    fix=f"leave {field} out of the job, or choose another strategy",
                )
    bad = [name for name, weight in job.site_weights.items() if not 0 < weight < math.inf]
    if bad:
        raise ConfigError(
            f"the weight of {bad[0]} is {job.site_weights[bad[0]]}",
            where="site_weights",
            fix="give a number above zero; to leave a site out, take it off `sites`",
        )
    if job.sites is not None:
        job.settings(site_names(job.sites))  # names, and min_sites and the strategy against their number
    Options(  # the rules for what a script may say too are there
        every=job.every, exchange=job.exchange, keep_local=job.keep_local, optimizer_state=job.optimizer_state
    )
    chosen = strategy if "strategy" in job.model_fields_set else None  # else the script may say
    check_filters(job.filters, job.optimizer_state, chosen)
    if job.cross_site:
        check_cross_site(job.filters, chosen)
    if LocalTerms.from_config(strategy.configure(1, ())).control_variates:
        check_filters(job.filters, "average", chosen)  # they travel as moments do
    if job.exact_restart:
        check_repeatable(job.filters)
        if strategy.buffer:
            raise ConfigError(
                f"exact_restart needs rounds, and the strategy {job.strategy} has none",
                where="exact_restart",
                fix="leave exact_restart out of the job, or choose another strategy",
            )


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a folder",
            where=field,
            fix="use at most 64 letters, digits, '.', '_' and '-', and begin with a letter or digit",
        )


def _name_for(app: str) -> str:
    """jobs/my train.py -> my-train-1122-164503, at 16:45:03 on 22 November."""
    stem = app.rpartition(".")[2] if _is_module(app) else PurePath(app).stem
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-_")[:40] or "job"
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}"


def _is_module(app: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)+", app) is not None and not app.endswith(".py")


def _explained(error: ValidationError) -> ConfigError:
    """Pydantic's findings as one of our errors: all fields that are wrong, a line each."""
    found: dict[str, tuple[object, list[str]]] = {}
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else "job"
        texts = found.setdefault(field, (item.get("input"), []))[1]
        texts.append({"missing": "", "extra_forbidden": ""}.get(item["type"], item["msg"]))
    unknown = [field for field in found if field not in Job.model_fields]
    return ConfigError(
        "; ".join(_sentence(field, value, texts) for field, (value, texts) in found.items()),
        where=", ".join(found),
        fix="the fields of a job are: " + ", ".join(Job.model_fields) if unknown else "correct it there",
    )


def _sentence(field: str, value: object, texts: list[str]) -> str:
    if field not in Job.model_fields:
        return f"{field} is not a field of a job"
    if texts == [""]:
        return f"{field} is missing"
    wanted = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in texts))
    return f"{field} cannot be {value!r}: it should be {wanted}"
