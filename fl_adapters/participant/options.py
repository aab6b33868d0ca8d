"""The arguments that every adapter shares, and how script, job and default decide together."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias

from fl_adapters.participant.local_work.phases import local_phases
from fl_runtime.errors import ConfigError

Exchange: TypeAlias = str | tuple[str, ...]
OptimizerPolicy = Literal["keep", "reset", "average"]

_POLICIES = ("keep", "reset", "average")
_EXCHANGES = ("auto", "trainable", "all")


@dataclass(frozen=True)
class Every:
    """The local budget between two exchanges: whole epochs, or optimizer steps; exactly one of them is set."""

    epochs: int | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, value: str | int) -> Every:
        """ "epoch", "2 epochs", "50 steps" or 50 (optimizer steps); ConfigError for anything else."""
        match = re.fullmatch(r"\s*(\d+)?\s*(epochs?|steps?)?\s*", str(value))
        number, unit = match.groups() if match else (None, None)
        count = int(number) if number else 1
        if isinstance(value, bool) or match is None or not (number or unit == "epoch") or count < 1:
            raise ConfigError(
                f"every={value!r} is no budget",
                fix='give "epoch", "2 epochs", or a number of optimizer steps such as 50',
            )
        return cls(epochs=count) if unit and unit.startswith("epoch") else cls(steps=count)

    def __str__(self) -> str:
        if self.epochs is not None:
            return "epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a script may say about its federation (DESIGN 1.1). None: let the job or the default decide.

    kit: folder of the site's startup kit. every: see Every. exchange: "auto", "trainable", "all" or name patterns.
    keep_local: name patterns that never leave the site. optimizer_state: "keep", "reset" or "average".
    num_examples: weight of this site's updates, > 0. required: an error instead of a local run without a kit.
    Raises ConfigError for values that cannot work.
    """

    kit: str | None = None
    every: str | int | None = None
    exchange: str | Sequence[str] | None = None
    keep_local: Sequence[str] = ()
    optimizer_state: str | None = None
    evaluate_global: bool | None = None
    num_examples: int | None = None
    required: bool = False

    def __post_init__(self) -> None:
        if self.every is not None:
            Every.parse(self.every)
        _exchange(self.exchange)
        _patterns("keep_local", self.keep_local)
        _policy(self.optimizer_state)
        n = self.num_examples
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n <= 0):
            raise ConfigError(
                f"num_examples={n!r}: the weight of a site's updates must be a whole number above zero",
                fix="leave it out to use the size of the training set",
            )


@dataclass(frozen=True)
class SiteSettings:
    """What holds at this site, after precedence: script argument, then job, then default.

    phases: how often each round trains its budget; twice where the strategy has a personal model.
    """

    rounds: int | None
    every: Every
    exchange: Exchange
    keep_local: tuple[str, ...]
    optimizer_state: OptimizerPolicy
    evaluate_global: bool | None
    seed: int | None
    best_metric: str
    best_mode: str
    phases: int = 1
    cross_site: bool = False
    strategy: str | None = None
    exact_restart: bool = False

    @classmethod
    def resolve(cls, options: Options, job: Mapping[str, Any]) -> SiteSettings:
        """`job`: the job's settings as the server sends them. keep_local adds up: nobody can take a name off it."""
        return cls(
            rounds=job.get("rounds"),
            every=Every.parse(_first(options.every, job.get("every"), "epoch")),
            exchange=_exchange(_first(options.exchange, job.get("exchange"), "auto")) or "auto",
            keep_local=(*options.keep_local, *(job.get("keep_local") or ())),
            optimizer_state=_policy(_first(options.optimizer_state, job.get("optimizer_state"), "keep")) or "keep",
            evaluate_global=options.evaluate_global,
            seed=job.get("seed"),
            best_metric=job.get("best_metric") or "loss",
            best_mode=job.get("best_mode") or "min",
            phases=local_phases(job.get("strategy")),
            cross_site=bool(job.get("cross_site")),
            strategy=job.get("strategy"),
            exact_restart=bool(job.get("exact_restart")),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SiteSettings:
        exchange = fields["exchange"]
        changed = {
            "every": Every(**fields["every"]),
            "exchange": exchange if isinstance(exchange, str) else tuple(exchange),
            "keep_local": tuple(fields["keep_local"]),
        }
        return cls(**{**fields, **changed})


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _exchange(value: Any) -> Exchange | None:
    if value is None or value in _EXCHANGES:
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        raise ConfigError(
            f"exchange={value!r} is not known",
            fix=f"give one of {', '.join(_EXCHANGES)}, or a list of name patterns such as ['encoder.*']",
        )
    return _patterns("exchange", value)


def _patterns(argument: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(p, str) for p in value):
        raise ConfigError(f"{argument}={value!r} is no list of name patterns", fix=f"write {argument}=['head.*']")
    return tuple(value)


def _policy(value: Any) -> OptimizerPolicy | None:
    if value is not None and value not in _POLICIES:
        raise ConfigError(f"optimizer_state={value!r} is not known", fix=f"give one of {', '.join(_POLICIES)}")
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
        )
