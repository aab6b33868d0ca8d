"""The arguments that all adapters share, and the settings that hold at a site: script, then job, then default."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias

from fl_adapters.participant.local_work.dp_sgd import DELTA_INFO, DPSGD
from fl_adapters.participant.local_work.site_plan import SitePlan
from fl_runtime.aggregation.metrics.ranking import Ranking
from fl_runtime.errors import ConfigError
from fl_runtime.types import Content, Terms
from fl_runtime.wire.names import TENSORS_OF, Facts, Names, names_of

Exchange: TypeAlias = str | tuple[str, ...]
"""What travels: "auto", "trainable", "all", or name patterns."""

OptimizerPolicy = Literal["keep", "reset", "average"]
"""What happens to optimizer state when new global weights arrive."""

_POLICIES = ("keep", "reset", "average")
_LISTED = 8
_EXCHANGES = ("auto", "trainable", "all")


@dataclass(frozen=True)
class Every:
    """The local budget between two exchanges, in epochs or in optimizer steps. Exactly one of them is set.

    Attributes:
        epochs: Number of whole epochs.
        steps: Number of optimizer steps.
    """

    epochs: int | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, value: str | int) -> Every:
        """Read a budget.

        Args:
            value: "epoch", "2 epochs", "50 steps", or a number of optimizer steps such as 50.

        Returns:
            The budget.

        Raises:
            ConfigError: The value is none of these.
        """
        match = re.fullmatch(r"\s*(\d{1,9})?\s*(epochs?|steps?)?\s*", str(value))
        number, unit = match.groups() if match else (None, None)
        count = int(number) if number else 1
        if isinstance(value, bool) or match is None or not (number or unit == "epoch") or count < 1:
            raise ConfigError(
                f"every={value!r} is not a local budget",
                fix='give "epoch", "2 epochs", or a number of optimizer steps such as 50',
            )
        return cls(epochs=count) if unit and unit.startswith("epoch") else cls(steps=count)

    def __str__(self) -> str:
        if self.epochs is not None:
            return "epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{self.steps} steps"


def announce_budget(rounds: int, every: Every, own: str, *, phases: int = 1) -> None:
    """Say on stderr that the job's length takes the place of the trainer's own.

    Args:
        rounds: Number of rounds that the job asks for.
        every: Local budget of a round, or of each phase of it.
        own: The trainer's own length, as the user wrote it: "num_train_epochs=2".
        phases: How often a round trains its budget.
    """
    twice = ", trained twice in each," if phases == 2 else ""
    budget = "1 epoch" if every.epochs == 1 else str(every)
    length = f"{rounds} {'round' if rounds == 1 else 'rounds'} of {budget}{twice}"
    verb = "replaces" if rounds == 1 else "replace"
    print(f"fl-adapters: the job's {length} {verb} {own}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments that every adapter shares. None leaves the choice to the job, then to the default.

    Attributes:
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        every: Local budget between two exchanges: "epoch", "2 epochs", or a number of optimizer steps.
        exchange: What travels: "auto", "trainable", "all", or a list of name patterns.
        keep_local: Name patterns of tensors that never leave the site. They add to those of the job.
        optimizer_state: What happens to optimizer state at an exchange: "keep", "reset" or "average".
        evaluate_global: Whether to evaluate every global model on the trainer's own validation data. None evaluates
            if there is validation data.
        num_examples: Weight of this site's updates, above 0. None counts the training examples.
        required: Whether a missing startup kit is an error, instead of a local run.
        agree: Whether lists of names that the adapter sees, such as labels and vocabularies, must be equal at all
            sites; or further such lists, by any name.
        dp_sgd: How to train with differential privacy for records; None trains without.

    Raises:
        ConfigError: An argument cannot work.
    """

    kit: str | None = None
    every: str | int | None = None
    exchange: str | Sequence[str] | None = None
    keep_local: Sequence[str] = ()
    optimizer_state: str | None = None
    evaluate_global: bool | None = None
    num_examples: int | None = None
    required: bool = False
    agree: bool | Mapping[str, Sequence[Any]] = True
    dp_sgd: DPSGD | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dp_sgd, DPSGD | None):
            raise ConfigError(f"dp_sgd={self.dp_sgd!r} is not a DPSGD", fix="write dp_sgd=fl_adapters.DPSGD(epsilon=8)")
        if self.every is not None:
            Every.parse(self.every)
        _exchange(self.exchange)
        _patterns("keep_local", self.keep_local)
        _policy(self.optimizer_state)
        _lists_of_names(self.agree)
        n = self.num_examples
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n <= 0):
            raise ConfigError(
                f"num_examples={n!r}: the weight of a site's updates must be a whole number above zero",
                fix="leave it out to use the size of the training set",
            )


@dataclass(frozen=True)
class BestMetric:
    """A metric of global models, and which values of it are better.

    Attributes:
        name: Name of the metric as it is reported, without a prefix for "validation".
        mode: Whether lower ("min") or higher ("max") values are better.
    """

    name: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class SiteSettings:
    """The settings that hold at a site: the script's argument, else the job's, else the default.

    Attributes:
        rounds: Number of rounds; None leaves it to the trainer's own budget.
        every: Local budget between two exchanges.
        exchange: What travels.
        keep_local: Name patterns of tensors that never leave the site.
        optimizer_state: What happens to optimizer state at an exchange.
        evaluate_global: Whether to evaluate global models; None if there is validation data.
        seed: The job's seed.
        best_metric: Metric that decides which round is the best; None if the job leaves it to the script.
        best_mode: Whether lower ("min") or higher ("max") values of it are better; None likewise.
        cross_site: Whether this site evaluates the models of all sites after the last round.
        exact_restart: Whether this site must end with the same bits after a restart.
        secure_sum: Whether updates leave this site masked.
        plan: What the job's strategy requires of this site.
        agree: Whether lists of names must be equal at all sites; or further such lists, by any name.
        dp_sgd: How the site trains with differential privacy for records; None if it does not.
    """

    rounds: int | None
    every: Every
    exchange: Exchange
    keep_local: tuple[str, ...]
    optimizer_state: OptimizerPolicy
    evaluate_global: bool | None
    seed: int | None
    best_metric: str | None
    best_mode: Literal["min", "max"] | None
    cross_site: bool = False
    exact_restart: bool = False
    secure_sum: bool = False
    plan: SitePlan = field(default_factory=SitePlan)
    agree: bool | Mapping[str, Sequence[str]] = True
    dp_sgd: DPSGD | None = None

    @classmethod
    def resolve(cls, options: Options, job: Mapping[str, Any]) -> SiteSettings:
        """Return what holds at this site.

        Args:
            options: The script's arguments. They win over the job, but for `keep_local`, where both lists count.
            job: The job's settings, as the server sends them.

        Returns:
            The settings.

        Raises:
            ConfigError: A value of the job cannot work.
        """
        return cls(
            rounds=job.get("rounds"),
            every=Every.parse(_first(options.every, job.get("every"), "epoch")),
            exchange=_exchange(_first(options.exchange, job.get("exchange"), "auto")) or "auto",
            keep_local=(*options.keep_local, *(job.get("keep_local") or ())),
            optimizer_state=_policy(_first(options.optimizer_state, job.get("optimizer_state"), "keep")) or "keep",
            evaluate_global=options.evaluate_global,
            seed=job.get("seed"),
            best_metric=job.get("best_metric"),
            best_mode=job.get("best_mode"),
            cross_site=bool(job.get("cross_site")),
            exact_restart=bool(job.get("exact_restart")),
            secure_sum=bool(job.get("secure_sum")),
            plan=SitePlan.parse(job.get("strategy")),
            agree=_lists_of_names(options.agree),
            dp_sgd=options.dp_sgd,
        )

    def best(self, proposed: BestMetric | None) -> BestMetric:
        """Return what decides which round is the best.

        Args:
            proposed: What the script's framework uses, or None.

        Returns:
            The job's metric and mode, else the proposed ones, else the lowest loss.
        """
        terms = Terms(best_metric=proposed.name, best_mode=proposed.mode) if proposed else Terms()
        ranking = Ranking.of(terms, self.best_metric, self.best_mode)
        return BestMetric(ranking.metric, ranking.mode)

    def terms(self, content: Content, proposed: BestMetric | None) -> Terms:
        """Return the terms of this site's handshake.

        Args:
            content: What the arrays of updates hold.
            proposed: What the script's framework picks its best model by, or None.

        Returns:
            Terms with the proposed metric, unless the job has decided.
        """
        decided = self.best_metric is not None and self.best_mode is not None
        if proposed is None or decided or self.best_metric not in (None, proposed.name):
            return Terms(content=content)
        return Terms(content=content, best_metric=proposed.name, best_mode=proposed.mode)

    def declared(self, facts: Facts) -> Facts:
        """Return what this site declares at the handshake.

        Args:
            facts: What the adapter sees: texts, and lists of names such as labels.

        Returns:
            `facts` with these settings and the script's own lists (`agree={...}`). Without any lists if `agree` is
            False, which is said on stderr if the adapter sees some.
        """
        own = self.agree if isinstance(self.agree, Mapping) else {}
        facts = {**facts, **{name: names_of(entries) for name, entries in own.items()}}
        lists = [n for n, fact in facts.items() if isinstance(fact, Names) and not n.startswith(TENSORS_OF)]
        if self.agree is False and lists:
            told = ", ".join(lists[:_LISTED]) + (", ..." if len(lists) > _LISTED else "")
            print(f"fl-adapters: agree=False: not compared with other sites: {told}", file=sys.stderr)
            facts = {name: fact for name, fact in facts.items() if name not in lists}
        return {**facts, "every": str(self.every), "optimizer_state": self.optimizer_state}

    @property
    def training_info(self) -> Mapping[str, str]:
        """What the server may know about this site's training, beside its framework, if the policy allows it."""
        return {DELTA_INFO: f"{self.dp_sgd.delta:g}"} if self.dp_sgd is not None else {}

    @property
    def phases(self) -> int:
        """Number of times each round trains the local budget: 2 with a personal model (Ditto), else 1."""
        return self.plan.phases

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, for the other ranks of this site."""
        return {**asdict(self), "plan": self.plan.spec}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SiteSettings:
        """Return the settings that `to_json` wrote.

        Args:
            fields: The result of `to_json`, which may have passed through JSON.

        Returns:
            Equal settings.
        """
        exchange = fields["exchange"]
        changed = {
            "every": Every(**fields["every"]),
            "exchange": exchange if isinstance(exchange, str) else tuple(exchange),
            "keep_local": tuple(fields["keep_local"]),
            "plan": SitePlan.parse(fields["plan"]),
        }
        return cls(**{**fields, **changed})


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _exchange(value: Any) -> Exchange | None:
    if value is None or value in _EXCHANGES:
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        raise ConfigError(
            f"exchange={value!r} is unknown",
            fix=f"give one of {', '.join(_EXCHANGES)}, or a list of name patterns such as ['encoder.*']",
        )
    return _patterns("exchange", value)


def _patterns(argument: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(p, str) for p in value):
        raise ConfigError(f"{argument}={value!r} is not a list of name patterns", fix=f"write {argument}=['head.*']")
    return tuple(value)


def _lists_of_names(value: Any) -> bool | dict[str, tuple[str, ...]]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Mapping) or any(isinstance(v, str) or not isinstance(v, Iterable) for v in value.values()):
        raise ConfigError(
            f"agree={value!r} is neither True or False nor lists of names",
            fix="write agree={'labels': ['cat', 'dog']}, or agree=False to compare nothing but the model",
        )
    return {str(name): tuple(str(entry) for entry in entries) for name, entries in value.items()}


def _policy(value: Any) -> OptimizerPolicy | None:
    if value is not None and value not in _POLICIES:
        raise ConfigError(f"optimizer_state={value!r} is unknown", fix=f"give one of {', '.join(_POLICIES)}")
    return value  # type: ignore[no-any-return]


class SharedArguments:
    """Base of the callbacks: the constructor arguments that every adapter shares, keyword-only.

    Args:
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set. Without a kit the script trains alone.
        every: Local budget between two exchanges: "epoch", "2 epochs", or a number of optimizer steps. Default: the
            job's, else "epoch".
        exchange: What travels: "auto" (trained parameters and buffers; of a PEFT model its adapter), "trainable",
            "all", or a list of name patterns such as `["encoder.*"]`. Default: the job's, else "auto".
        keep_local: Name patterns of tensors that never leave this site. Added to the job's own.
        optimizer_state: What becomes of the optimizer when new global weights arrive: "keep", "reset" its moments, or
            "average" them over the sites. Default: the job's, else "keep".
        evaluate_global: Whether each global model is scored on the trainer's own validation data, so that the server
            can pick the best round. Default: yes if there is validation data.
        num_examples: Weight of this site in the average, above 0. Default: the size of its training set.
        required: Raise an error instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (labels, vocabularies, features) must be equal at all sites.
            A dict adds lists that it cannot see: `agree={"labels": ["cat", "dog"]}`. Default: yes.

    Raises:
        ConfigError: If a value cannot work.

    Attributes:
        options: The arguments, checked.
    """

    def __init__(
        self,
        *,
        kit: str | None = None,
        every: str | int | None = None,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
        agree: bool | Mapping[str, Sequence[Any]] = True,
    ) -> None:
        super().__init__()
        self.options = Options(
            kit=kit,
            every=every,
            exchange=exchange,
            keep_local=keep_local,
            optimizer_state=optimizer_state,
            evaluate_global=evaluate_global,
            num_examples=num_examples,
            required=required,
            agree=agree,
        )


class PrivateArguments(SharedArguments):
    """Base of the callbacks that can train with differential privacy for single records (DP-SGD).

    Args:
        dp_sgd: Settings of DP-SGD, such as `DPSGD(max_grad_norm=1.0, epsilon=8)`. Default: None, without noise.
        kit: See `SharedArguments`, as all that follow.
        every: Training between two exchanges.
        exchange: What travels.
        keep_local: Name patterns of tensors that never leave this site.
        optimizer_state: What becomes of the optimizer when new global weights arrive.
        evaluate_global: Whether each global model is scored.
        num_examples: Weight of this site in the average.
        required: Raise an error instead of training alone if there is no startup kit.
        agree: Whether lists of names must be equal at all sites; or further such lists.

    Raises:
        ConfigError: If a value cannot work.
    """

    def __init__(
        self,
        *,
        dp_sgd: DPSGD | None = None,
        kit: str | None = None,
        every: str | int | None = None,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
        agree: bool | Mapping[str, Sequence[Any]] = True,
    ) -> None:
        super().__init__(
            kit=kit,
            every=every,
            exchange=exchange,
            keep_local=keep_local,
            optimizer_state=optimizer_state,
            evaluate_global=evaluate_global,
            num_examples=num_examples,
            required=required,
            agree=agree,
        )
        self.options = replace(self.options, dp_sgd=dp_sgd)
