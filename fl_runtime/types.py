"""The few types that everything speaks. All frozen; arrays inside are borrowed unless a docstring says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Arrays: TypeAlias = Mapping[str, Array]
"""Tensor name -> host array, in a fixed order. bfloat16 and float8 are the `ml_dtypes` dtypes."""


def is_floating(dtype: np.dtype[Any]) -> bool:
    """True for what is averaged (floats of any width, complex); integers and booleans are not."""
    return dtype.kind in "fcV" and dtype.names is None


Metrics: TypeAlias = Mapping[str, float]
Settings: TypeAlias = Mapping[str, Any]
"""JSON values: what may travel beside tensors."""

Content = Literal["weights", "delta", "encoded"]

EXACT_RESTART = "exact-restart"
"""The capability that a job with `exact_restart` asks of every site."""

TaskKind = Literal["initial", "train", "final", "best", "evaluate", "evaluated", "share", "aggregate"]


@dataclass(frozen=True)
class Task:
    """What the server asks of a site.

    kind: "initial" (send your weights, they become version 0), "train" (train one round from `arrays`),
    "final" (`arrays` is the global model after the last round), "best" (the best round's model), "evaluate" (a model
    to be scored: `config["model"]` says whose), "evaluated" (there is no more of these); where sites themselves form
    the mean: "share" (send your update to the site `config["to"]`) and "aggregate" (form it: `config["sites"]`).
    version: number of the global model in `arrays`: the round whose result it is, 0 for the initial one; what sites
    have sent, and others evaluate, has numbers behind the last round's.
    arrays, extras: views of the receiver's buffer, valid until its next task arrives; they may be written to.
    config: settings of this task (strategy parameters, what to export); JSON values.
    """

    job: str
    round: int
    stage: str
    kind: TaskKind
    version: int
    arrays: Arrays
    extras: Arrays = field(default_factory=dict)
    config: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a site sends back: its arrays after local work on a task.

    content: what `arrays` holds: the new weights, their difference to the base version, or content that only
    `encoding` explains. extras: arrays that travel beside the weights (optimizer moments, control variates).
    num_examples: the weight of this update in an average, > 0. local_steps: optimizer steps of this round.
    site_weight: what the job multiplies it by; known to the server alone.
    """

    job: str
    round: int
    stage: str
    site: str
    attempt: int
    base_version: int
    arrays: Arrays
    num_examples: int
    local_steps: int = 0
    metrics: Metrics = field(default_factory=dict)
    content: Content = "weights"
    encoding: str = ""
    extras: Arrays = field(default_factory=dict)
    site_weight: float = 1.0

    @property
    def weight(self) -> float:
        """What counts in an average."""
        return self.num_examples * self.site_weight


@dataclass(frozen=True)
class Summary:
    """What a site's part of a metric comes to, where the mean of the sites' values is not the metric of all data.

    value: on the site's own data. weight: of its data in that metric. kind: "mean" and "root_mean" (of squares)
    are pooled from value and weight; "auc" and "aucpr" from `histogram`, score bin -> (weight of negatives, of
    positives), bins in ascending order of the score.
    """

    kind: Literal["mean", "root_mean", "auc", "aucpr"]
    value: float
    weight: float
    histogram: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Metrics of a global model on a site's own validation data. version: which global model was scored."""

    job: str
    version: int
    site: str
    metrics: Mapping[str, float | Summary]
    num_examples: int


CROSS_EVALUATION = "cross-evaluation"
"""The capability of an adapter that scores other sites' models too, where the job wants it (`cross_site`)."""


@dataclass(frozen=True)
class Terms:
    """What a site's script says of the run where the job is silent; all sites must say the same.

    content: what its updates hold. strategy: the one that fits them. best_metric, best_mode: which round is the
    best one. patience: the run ends when the best round is so many rounds back; None: it does not. min_delta: by
    how much a better metric must be better, for that.
    """

    content: Content = "weights"
    strategy: str = "fedavg"
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0


@dataclass(frozen=True)
class RunSettings:
    """The settings of one job, as the server and the sites read them. See `fl_adapters.Job` for what each means.

    app, submitted_by: what the sites run, and the identity (URI) of who submitted it; empty in a simulation.
    strategy, best_metric, best_mode, patience: None leaves them to the `Terms` of the sites.
    """

    name: str
    sites: tuple[str, ...]
    min_sites: int
    rounds: int | None = None
    strategy: str | None = None
    deadline_s: float = 86_400.0
    late: Literal["drop", "carry"] = "drop"
    every: str | int | None = None
    exchange: str | tuple[str, ...] | None = None
    keep_local: tuple[str, ...] = ()
    optimizer_state: str | None = None
    filters: tuple[Settings, ...] = ()
    initial: str | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] | None = None
    seed: int | None = None
    exact_restart: bool = False
    rejoin_s: float = 60.0
    app: str = ""
    submitted_by: str = ""
    fraction: float = 1.0
    site_weights: Mapping[str, float] = field(default_factory=dict)
    patience: int | None = None
    min_delta: float = 0.0
    cross_site: bool = False
    durability: Literal["process", "power"] = "process"

    @property
    def sites_per_round(self) -> int:
        """How many sites a round has: `fraction` of all, rounded up."""
        return max(1, math.ceil(self.fraction * len(self.sites) - 1e-9))


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; a line of events.jsonl, and what a live table listens to.

    kind: joined, registered, started, round_started, task_sent, update, aggregator (a site forms the mean of the round:
    `Swarm`), round_finished, report (a site has scored
    the model of `round`), scored (all have), cross_score (a site has scored another's model), cross_site (all have,
    with the matrix), round_dropped (an open round that is not needed), left, failed,
    finished; a simulation adds starting, restarted and exited.
    time: seconds since the epoch. round, site: 0 and "" where they do not apply.
    """

    kind: str
    time: float
    round: int = 0
    site: str = ""
    data: Settings = field(default_factory=dict)


Listener: TypeAlias = Callable[[Event], None]


class Filter(Protocol):
    """Changes an update (or the arrays of a task) on its way; may work in place on the arrays it is given."""

    def __call__(self, update: Update, task: Task) -> Update: ...


class Aggregator(Protocol):
    """One round's sum. Updates come in a fixed order, whatever the order of arrival."""

    def add(self, update: Update) -> None:
        """Take one update into the sum. The arrays are borrowed until `result` has been called: they lie on the
        server's disk, mapped, so holding them costs no memory."""
        ...

    def result(self) -> tuple[Arrays, Arrays]:
        """(arrays, extras) of the next global model, in the buffers that the strategy was given.

        Raises RoundFailedError where these updates come to nothing: the round is opened again.
        """
        ...


Allocate: TypeAlias = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]
"""allocate(arrays, extras) -> writable arrays of the same names, shapes and dtypes: the next model's own buffer."""


@dataclass(frozen=True)
class Step:
    """What happens in a round: the global model goes to some sites, and what they make of it comes back.

    to: the sites, None for all that are there. answers: how many updates the round waits for; None: all of them.
    """

    to: tuple[str, ...] | None = None
    answers: int | None = None


@dataclass(frozen=True)
class ServerState:
    """What the rounds before have left beside the weights, and where this one leaves its own.

    extras: those of the global model, which have travelled to the sites. kept: what the aggregator of the last round
    has kept; empty in the first. keep(arrays): writable arrays of the same names, shapes and dtypes, which are
    committed together with the next model, never leave the server, and are the next round's `kept`.
    """

    extras: Arrays = field(default_factory=dict)
    kept: Arrays = field(default_factory=dict)
    keep: Callable[[Arrays], Arrays] = dict


class Strategy(Protocol):
    """How a round's updates become the next global model. Runs at the server, in NumPy alone.

    content: what the updates hold. The tensors of "weights" are those of the handshake; those of "encoded" have
    the same names and dtypes, and shapes that may change from round to round as `agreed_shape` says.
    initial: whose contribution the initial model is: the first site's, or made of all sites' by an aggregator of
    round 0, whose base is empty.
    linear: the weighted mean of the updates is all that it needs of them, so somebody else may form that.
    weighted: the weights of the sites make a difference.
    relayed: the aggregator runs at one of the sites, and the server gets what it makes, not the updates.
    """

    content: ClassVar[Content]
    initial: ClassVar[Literal["first", "all"]]
    weighted: ClassVar[bool]

    @property
    def linear(self) -> bool: ...

    @property
    def requires(self) -> frozenset[str]:
        """Capabilities that every site's adapter must have declared; "weights" is that of content "weights"."""
        ...

    @property
    def relayed(self) -> bool: ...

    @property
    def spec(self) -> str:
        """The strategy as text, as a job names it."""
        ...

    @property
    def buffer(self) -> int | None:
        """None: rounds. k: no site ever waits, and every k updates, of content "delta", make the next model."""
        ...

    def check_sites(self, fewest: int) -> None:
        """ConfigError if a round cannot work with `fewest` updates, the fewest that the job lets it close with."""
        ...

    def step(self, round: int, present: Sequence[str]) -> Step:
        """Who takes part in this round, of the sites that are there; the same for the same arguments."""
        ...

    def scored_by(self, site: str, models: Sequence[str]) -> Sequence[str]:
        """Which of these models a site evaluates after the last round; the same for the same arguments."""
        ...

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What all sites, and all updates, must have in common of a tensor's shape: -1 where they may differ."""
        ...

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Settings that travel with the tasks of this round; the same for the same arguments."""
        ...

    def check(self, update: Update) -> None:
        """Raises UpdateRefusedError for an update that no aggregator should see. May be called by many threads."""
        ...

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """For one round. base: the global model so far. config: what `configure` said. May be called again for the
        same round, when its sum has to begin anew."""
        ...

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """(file name, content) of a global model in a format of its own; None: a plain file of tensors."""
        ...
