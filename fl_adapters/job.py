"""`Job`: the settings of a federated run, written in Python or in YAML."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_adapters.environments.tracking.targets import Targets
from fl_adapters.participant.options import Options
from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.aggregation.shares import check_max_share
from fl_runtime.aggregation.spec import Described
from fl_runtime.errors import ConfigError
from fl_runtime.filters import (
    check_best_metric,
    check_budgets,
    check_cross_site,
    check_filters,
    check_repeatable,
    check_site_weights,
)
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.secure_sum.requirements import check_secure_sum
from fl_runtime.text import METRIC_NAMES, is_metric_name
from fl_runtime.types import LARGEST_SEED, LONGEST_S, MOST_ROUNDS, MOST_SITES, RunSettings, Strategy
from fl_runtime.types.needs import Needs
from fl_runtime.yaml_files import read_yaml, settings_error

R_co = TypeVar("R_co", covariant=True)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = ("global", "local")  # names in history.csv, and of a script that runs alone


class Environment(Protocol[R_co]):
    """Where a job runs: `Simulation`, `ProofOfConcept` or `Production`."""

    def run(self, job: Job) -> R_co:
        """Run a job to its end.

        Args:
            job: The job.

        Returns:
            What this environment returns for a finished run.
        """
        ...


class EarlierModel(BaseModel):
    """A global model that an earlier job has left at the server, as the initial model of another.

    Attributes:
        job: Name of the earlier job.
        model: "last", or "best" for that of its best round.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    job: str = Field(pattern=f"^{_NAME.pattern}$")
    model: Literal["last", "best"] = "last"


class Job(BaseModel):
    """The settings of one federated run. Frozen. It carries settings, never code.

    Every field is checked when the job is made. In YAML (`from_file`), a job is one setting per line.

    Attributes:
        name: Name of the job and of its folder runs/<name>: at most 64 letters, digits, ".", "_" and "-". Default:
            made from the app and the time.
        app: The script, module or app name that every site runs. Required.
        rounds: Number of rounds, at most a million. Default None: the trainer's own budget decides, and all sites must
            agree on it. Option `--rounds`.
        strategy: How updates become the next global model: a name ("fedavg"), a name with arguments
            ("fedadam:lr=0.1,tau=0.001"), or an object such as `FedAdam(lr=0.1)`, which is kept as that text. Default
            "fedavg", which gives way to what the script needs (trees of XGBoost). Option `--strategy`.
        sites: Number of sites, or their names. Default None: the environment decides. Option `--sites`.
        min_sites: Number of updates that a round needs (the quorum). Default None: one from every site that takes
            part.
        cross_site: Whether every site evaluates, after the last round, the global model and the last model of every
            site, which all sites therefore receive. Default False.
        fraction: Share of the sites that take part in a round, above 0 and at most 1, drawn for each round from
            `seed` and its number. The others wait. Default 1.0.
        site_weights: Site name -> factor of its weight in the average, above 0. Default: 1 for every site.
        max_share: Largest share of one site in the weights of a model, above 0 and at most 1. A site above it is scaled
            down to it, whatever number of examples it states. Default None: no cap.
        deadline_s: Seconds after which a round closes with the updates that are there, if they make a quorum.
            Default 86400 (a day).
        rejoin_s: Seconds to wait for a site whose process or connection is gone, before `min_sites` decides.
            Default 60.
        patience_s: Seconds for which the job waits without a quorum, and a site without the server. Default None: in a
            federation between organisations what its project file says, else a day. In a simulation `rejoin_s` at the
            server and 30 at the sites.
        join_s: Seconds to wait for further sites before round 1, once `min_sites` are there. Others may still join
            later. Default None: ten minutes in a federation between organisations, `deadline_s` in a simulation.
        late: What happens to an update that arrives after its round has closed: "drop" it, or "carry" it into the
            next round. There the site's change to the model that it trained from is applied to the newer one.
            Default "drop".
        durability: What acknowledged updates survive: the death of a "process", or a "power" failure too, for which
            the server waits for its disk. Default "process".
        every: Local budget between two exchanges: "epoch", "N epochs", or a number of optimizer steps. Default None:
            the script's argument, else "epoch".
        exchange: What travels: "auto", "trainable", "all", or name patterns. Default None: the script's argument,
            else "auto".
        keep_local: Name patterns of tensors that never leave a site. They add to those of the scripts. Default: none.
        optimizer_state: What happens to optimizer state when new global weights arrive: "keep", "reset" or
            "average". Default None: the script's argument, else "keep".
        filters: Filters on the way of updates and models, in order. Each is a table with its `name`, its arguments,
            and optionally the point `at` which it runs (docs/filters.md). Default: none.
        initial: The initial global model: the path of a safetensors file, or the result of an earlier job at the same
            server, `{"job": NAME, "model": "best"}` ("last" without `model`). Default None: the first site's weights.
        best_metric: Metric that decides which round is the best. Default "loss", which gives way to the script's own
            early stopping. Option `--best-metric`.
        best_mode: Whether lower ("min") or higher ("max") values of it are better. Default "min", which gives way
            likewise. Option `--best-mode`.
        patience: Number of rounds without a better `best_metric` after which the run ends. Default None: the script's
            own early stopping, if any.
        min_delta: Least difference of `best_metric` that counts as better, for `patience`. Default 0.
        trainings: Largest number of trainings in a script, each of which is a run of its own (docs/trainings.md).
            With 1, the job ends with the run, and a script that trains a second time ends with an error. Default
            None: as many as the scripts have.
        seed: Seed of everything that the run draws, at least 0. Default None: 0 where one is needed.
        resources: What the job needs at each site, where the site tells what it has: `gpus`, a number of GPUs that it
            has for itself, and `memory_gb`. It waits in the queue until all its sites have so much free. Default: none;
            it then gets the GPUs of one place at the site.
        secure_sum: Whether sites mask their updates, so that the server learns their sum alone (docs/secure-sum.md).
            Default False. Option `--secure-sum`.
        exact_restart: Whether a site that is killed and started again ends with the same bits as without. Every round
            then begins with random states made from `seed`, the site and the round (docs/restart.md). Default False.
        track: Where the run is tracked: "mlflow:URI", "wandb", "tensorboard", or several (docs/tracking.md).

    Raises:
        ConfigError: A field cannot work, alone or together with others. The message names it.

    Example:
        ```python
        import fl_adapters as fl

        job = fl.Job(app="train.py", rounds=10, sites=3, strategy="fedadam:lr=0.1", min_sites=2)
        result = job.run(fl.Simulation())
        ```
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = ""
    app: str = Field(min_length=1)
    rounds: int | None = Field(default=None, ge=1, le=MOST_ROUNDS)
    strategy: str | Described = "fedavg"  # a job that has been made holds text
    sites: int | tuple[str, ...] | None = None
    min_sites: int | None = Field(default=None, ge=1, le=MOST_SITES)
    cross_site: bool = False
    fraction: float = Field(default=1.0, gt=0, le=1)
    site_weights: dict[str, float] = Field(default_factory=dict)
    max_share: float | None = Field(default=None, gt=0, le=1)
    deadline_s: float = Field(default=86_400.0, gt=0, le=LONGEST_S, allow_inf_nan=False)
    rejoin_s: float = Field(default=60.0, gt=0, le=LONGEST_S, allow_inf_nan=False)
    patience_s: float | None = Field(default=None, gt=0, le=LONGEST_S, allow_inf_nan=False)
    join_s: float | None = Field(default=None, ge=0, le=LONGEST_S, allow_inf_nan=False)
    late: Literal["drop", "carry"] = "drop"
    durability: Literal["process", "power"] = "process"
    every: str | int | None = None
    exchange: str | tuple[str, ...] | None = None
    keep_local: tuple[str, ...] = ()
    optimizer_state: Literal["keep", "reset", "average"] | None = None
    filters: tuple[dict[str, Any], ...] = ()
    initial: str | EarlierModel | None = None
    best_metric: str = Field(default="loss", min_length=1)
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = Field(default=None, ge=1, le=MOST_ROUNDS)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    trainings: int | None = Field(default=None, ge=1, le=MOST_ROUNDS)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    resources: dict[str, float] = Field(default_factory=dict)
    secure_sum: bool = False
    exact_restart: bool = False
    track: Targets = ()

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        if isinstance(data, cls):
            return data
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        if isinstance(data.get("initial"), Mapping):
            fields["initial"] = _earlier(data["initial"])
        strategy = fields.get("strategy")
        if isinstance(strategy, Described):
            fields["strategy"] = strategy.spec
        chosen = "name" in fields
        try:
            job = handler(fields if chosen else {**fields, "name": _name_for(str(fields.get("app", "job")))})
        except ValidationError as error:
            raise settings_error(error, cls.model_fields, "job") from None
        if not chosen:
            job.model_fields_set.discard("name")  # a made-up name may get a number if it is taken
        _check(job)
        return job

    @classmethod
    def from_file(cls, path: str | PurePath, **given: Any) -> Job:
        """Read a job from a YAML file.

        Args:
            path: The file.
            **given: Fields that replace those of the file.

        Returns:
            The job.

        Raises:
            ConfigError: The file cannot be read, or a field cannot work. The message names file and field.
        """
        fields = read_yaml(Path(path), "the job file")
        if not isinstance(fields, dict):
            raise ConfigError(
                "the job file is not a table of settings",
                where=str(path),
                fix="write one setting per line, such as `rounds: 10`",
            )
        try:
            return cls(**{str(name): value for name, value in fields.items()} | given)
        except ConfigError as error:
            if set(error.where.split(", ")) <= given.keys():  # the file is not at fault
                raise
            raise ConfigError(error.what, where=f"{path}: {error.where}".removesuffix(": "), fix=error.fix) from None

    def to_yaml(self) -> str:
        """Return the job as YAML, which `from_file` reads.

        Returns:
            Name, app, and the fields that differ from the defaults, one per line.
        """
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"name": self.name, "app": self.app, **changed}, sort_keys=False, allow_unicode=True)

    def run(self, environment: Environment[R_co]) -> R_co:
        """Run this job.

        Args:
            environment: Where to run it, such as `Simulation(sites=3)`.

        Returns:
            The result of the environment's `run`.

        Raises:
            FederationError: The run failed.
        """
        return environment.run(self)

    def settings(self, sites: Sequence[str]) -> RunSettings:
        """Return the settings that the server and the sites read.

        Args:
            sites: Names of the sites that take part.

        Returns:
            This job's fields with these sites. What the job leaves to the script is None.

        Raises:
            ConfigError: The job does not fit the sites: `min_sites` is too high, `site_weights` names other sites, or
                the strategy or `max_share` needs more updates.
        """
        names = check_names(sites)
        fields = self.model_dump(exclude={"app", "sites", "min_sites", "track"})
        if isinstance(self.initial, EarlierModel):
            fields |= {"initial": None, "initial_job": self.initial.model_dump()}
        fields |= dict.fromkeys({"strategy", "best_metric", "best_mode"} - self.model_fields_set)  # the script decides
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
                f"{unknown[0]!r} has a weight but is not a site of the job",
                where="site_weights",
                fix=f"its sites are: {', '.join(names)}",
            )
        settings = replace(settings, min_sites=self.min_sites or most)
        strategy = make_strategy(str(self.strategy))
        strategy.check_sites(settings.min_sites)
        check_max_share(settings, strategy)
        check_secure_sum(settings, strategy if "strategy" in self.model_fields_set else None)
        return settings


def _earlier(fields: Mapping[str, Any]) -> EarlierModel:
    try:
        return EarlierModel(**{str(name): value for name, value in fields.items()})
    except ValidationError:
        fix = "name an earlier job, and which of its models: {job: NAME, model: best} or {job: NAME, model: last}"
        raise ConfigError(f"initial cannot be {dict(fields)!r}", where="initial", fix=fix) from None


def site_names(sites: int | Sequence[str]) -> tuple[str, ...]:
    """Return the names of a job's sites.

    Args:
        sites: Number of sites, at least 1, or their names.

    Returns:
        "site-1", "site-2" and so on for a number, else the given names.

    Raises:
        ConfigError: The number is below 1 or above 100,000, or a name cannot be used; see `check_names`.
    """
    if isinstance(sites, int):
        if not 1 <= sites <= MOST_SITES:
            fix = f"give at least 1 site, and at most {MOST_SITES}"
            raise ConfigError(f"a job cannot run with {sites} sites", where="sites", fix=fix)
        return tuple(f"site-{number}" for number in range(1, sites + 1))
    return check_names(sites)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of a job's sites.

    Args:
        names: The names.

    Returns:
        The names as a tuple.

    Raises:
        ConfigError: There is no name, or a name is reserved, listed twice, or cannot name a folder.
    """
    if not names or isinstance(names, str):
        raise ConfigError(f"sites cannot be {names!r}", where="sites", fix="give a number of sites or a list of names")
    for name in names:
        _check_name(name, "sites")
        if name in _RESERVED:
            raise ConfigError(f"a site cannot be called {name!r}", where="sites", fix="choose another name")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f"site {twice[0]!r} is listed twice", where="sites", fix="give every site its own name")
    return tuple(names)


def _check(job: Job) -> None:
    """Check what the types of the fields alone do not say."""
    _check_name(job.name, "name")
    if not job.app.isprintable():
        raise ConfigError(
            f"the app cannot be called {job.app[:100]!r}",
            where="app",
            fix="use a name or path of printable characters: it is shown on the screens of sites and admins",
        )
    if not is_metric_name(job.best_metric):
        raise ConfigError(f"a metric cannot be called {job.best_metric[:50]!r}", where="best_metric", fix=METRIC_NAMES)
    strategy = make_strategy(str(job.strategy))
    if job.site_weights and not strategy.weighted:
        raise ConfigError(
            f"the strategy {job.strategy} does not support site_weights",
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
            f"under {job.strategy} the server holds no updates, so it cannot carry a late one into the next round",
            where="late",
            fix="leave late out of the job",
        )
    if job.late == "carry":
        _check_carried(job)
    if strategy.buffer:
        for field, wanted in (
            ("fraction", job.fraction < 1),
            ("cross_site", job.cross_site),
            ("patience", job.patience),
        ):
            if wanted:
                raise ConfigError(
                    f"{field} needs rounds, but the strategy {job.strategy} has none",
                    where=field,
                    fix=f"leave {field} out of the job, or choose another strategy",
                )
    invalid = [name for name, weight in job.site_weights.items() if not 0 < weight < math.inf]
    if invalid:
        raise ConfigError(
            f"the weight of {invalid[0]} is {job.site_weights[invalid[0]]}, which is not a number above zero",
            where="site_weights",
            fix="give a weight above zero; to leave a site out, remove it from `sites`",
        )
    try:
        Needs.of(job.resources)
    except ValueError as error:
        raise ConfigError(
            f"resources {error}", where="resources", fix=f"correct {job.resources}, or leave it out of the job"
        ) from None
    if job.sites is not None:
        job.settings(site_names(job.sites))  # names, and min_sites and the strategy against their number
    Options(  # checks the fields that a script may set as well
        every=job.every, exchange=job.exchange, keep_local=job.keep_local, optimizer_state=job.optimizer_state
    )
    chosen = strategy if "strategy" in job.model_fields_set else None  # else the script may choose
    check_filters(job.filters, job.optimizer_state, chosen)
    _check_budgets(job, chosen)
    if job.best_metric is not None:
        check_best_metric(job.filters, job.best_metric)
    if job.site_weights:
        check_site_weights(job.filters)
    if job.cross_site:
        check_cross_site(job.filters, chosen)
    if LocalTerms.from_config(strategy.configure(1, ())).control_variates:
        check_filters(job.filters, "average", chosen)  # control variates travel like moments
    if job.exact_restart:
        check_repeatable(job.filters)
        if strategy.buffer:
            raise ConfigError(
                f"exact_restart needs rounds, but the strategy {job.strategy} has none",
                where="exact_restart",
                fix="leave exact_restart out of the job, or choose another strategy",
            )


def _check_budgets(job: Job, strategy: Strategy | None) -> None:
    """Refuse privacy budgets that cannot hold. Without known sites, one site takes part in `fraction` of the rounds."""
    if job.sites is not None:
        settings = job.settings(site_names(job.sites))
    else:
        rounds = job.rounds and math.ceil(job.rounds * job.fraction)
        settings = RunSettings(job.name, ("any",), 1, rounds=rounds, seed=job.seed, trainings=job.trainings)
    check_budgets(job.filters, settings, strategy)


def _check_carried(job: Job) -> None:
    """Refuse what needs whole weights of the sites, which send differences if their updates may be carried."""
    encrypted = any(settings.get("name") == HomomorphicCKKS.__name__ for settings in job.filters)
    for what, wanted in (("cross_site", job.cross_site), ("the filter HomomorphicCKKS", encrypted)):
        if wanted:
            raise ConfigError(
                f"{what} needs whole weights, but with late: carry the sites send differences to the global model",
                where="late",
                fix=f"leave late or {what.removeprefix('the filter ')} out of the job",
            )


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a folder",
            where=field,
            fix="use at most 64 letters, digits, '.', '_' and '-', and begin with a letter or digit",
        )


def _name_for(app: str) -> str:
    """Return a name such as my-train-1122-164503, for "jobs/my train.py" on 22 November at 16:45:03."""
    stem = app.rpartition(".")[2] if _is_module(app) else PurePath(app).stem
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-_")[:40] or "job"
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}"


def _is_module(app: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)+", app) is not None and not app.endswith(".py")
