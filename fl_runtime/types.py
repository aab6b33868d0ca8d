"""Core types that all parts of the package share: tasks, updates, reports, settings, and the strategy protocol.

All dataclasses are frozen. Arrays in them are borrowed from their owner unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""A NumPy array of any dtype and shape, in host memory."""

Arrays: TypeAlias = Mapping[str, Array]
"""Tensor name -> host array, in a fixed order. bfloat16 and float8 are the `ml_dtypes` dtypes."""

Metrics: TypeAlias = Mapping[str, float]
"""Metric name -> value."""

Settings: TypeAlias = Mapping[str, Any]
"""Values that JSON can hold, by name: all that may travel beside arrays."""

Content = Literal["weights", "delta", "encoded"]
"""What the arrays of an update hold: new weights, their difference to the base model, or an encoding of its own."""
TaskKind = Literal["initial", "train", "final", "best", "evaluate", "evaluated", "share", "aggregate"]
"""What a task asks for; see `Task`."""


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether tensors of this dtype are averaged.

    Args:
        dtype: Any NumPy dtype, those of `ml_dtypes` included.

    Returns:
        True for floats of any width and for complex numbers, False for integers and booleans.
    """
    return dtype.kind in "fcV" and dtype.names is None


@dataclass(frozen=True)
class Task:
    """A request of the server to one site.

    The kinds of tasks:

    - "initial": send your weights; they become version 0 of the global model.
    - "train": train one round, starting from `arrays`.
    - "final": the run is over; `arrays` is the global model after the last round.
    - "best": `arrays` is the global model of the best round; empty if no round has a score of the best metric.
    - "evaluate": evaluate `arrays` on your validation data; `config["model"]` names whose model it is. "evaluated": no
      model is left to evaluate.
    - "share" (swarm only): send your update to the site `config["to"]`.
    - "aggregate" (swarm only): aggregate the updates of `config["sites"]`.

    Attributes:
        job: Name of the job.
        round: Number of the round, from 1; 0 for the initial model.
        stage: Label that distinguishes attempts at the same round: "" for the first.
        kind: What the site is to do.
        version: Version of the model in `arrays`: the round that produced it, 0 for the initial model. Models of
            single sites, which others evaluate, have versions above that of the last round.
        arrays: The model. Views of the receiver's buffer, valid until its next task arrives. May be written to.
        extras: Arrays that travel beside the model, such as optimizer moments. Owned like `arrays`.
        config: Settings of this task, such as the strategy's parameters.
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
    """The answer of a site to a task: its arrays after local training.

    Attributes:
        job: Name of the job.
        round: Round of the task that this answers.
        stage: Stage of that task.
        site: Name of the site.
        attempt: Number of the site's process in this run, from 1. The server refuses updates of earlier attempts.
        base_version: Version of the global model that training started from.
        arrays: The trained tensors, as `content` says.
        num_examples: Number of training examples, above 0: the weight of this update in an average.
        local_steps: Number of optimizer steps in this round, 0 if not counted.
        metrics: Training metrics of this round.
        content: What `arrays` holds.
        encoding: How `arrays` is encoded if `content` is "encoded": JSON of the filters that ran, or an adapter's
            own name. "" for plain arrays.
        extras: Arrays that travel beside the weights, such as optimizer moments or control variates.
        site_weight: Factor from the job's `site_weights`. Set by the server; not sent by sites.
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
        """Weight of this update in an average: the number of examples times the job's factor for the site."""
        return self.num_examples * self.site_weight


@dataclass(frozen=True)
class Summary:
    """One site's contribution to a metric that cannot be pooled as a mean of the sites' values.

    Attributes:
        kind: How the contributions are pooled. "mean" and "root_mean" (of squares) are pooled from `value` and
            `weight`; "auc" and "aucpr" from `histogram`.
        value: The metric on the site's own data.
        weight: Weight of the site's data in the metric.
        histogram: Score bin -> (weight of the negatives, weight of the positives), in ascending order of the score.
    """

    kind: Literal["mean", "root_mean", "auc", "aucpr"]
    value: float
    weight: float
    histogram: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Metrics of a model on one site's own validation data.

    Attributes:
        job: Name of the job.
        version: Version of the model that was evaluated.
        site: Name of the site.
        metrics: Metric name -> value, or a `Summary` of it.
        num_examples: Number of validation examples: the weight of the values in the mean over sites.
    """

    job: str
    version: int
    site: str
    metrics: Mapping[str, float | Summary]
    num_examples: int


@dataclass(frozen=True)
class Terms:
    """Settings that the sites' scripts propose where the job leaves them open. All sites must propose the same.

    Attributes:
        content: What the arrays of updates hold.
        strategy: The strategy that fits these updates, as text.
        best_metric: Metric that decides which round is the best.
        best_mode: Whether lower or higher values of that metric are better.
        patience: Number of rounds without a better metric after which the run ends; None never ends it early.
        min_delta: Least difference of the metric that counts as better, for `patience`.
    """

    content: Content = "weights"
    strategy: str = "fedavg"
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0


@dataclass(frozen=True)
class RunSettings:
    """The settings of one job as the server and the sites read them. `fl_adapters.Job` describes each in full.

    Attributes:
        name: Name of the job.
        sites: Names of the sites, in the order in which updates are summed.
        min_sites: Number of updates that a round needs (the quorum).
        rounds: Number of rounds; None leaves it to the sites' trainers, which must agree.
        strategy: The strategy as text; None leaves it to the sites' `Terms`.
        deadline_s: Seconds after which a round closes with the updates that are there.
        late: What happens to an update that arrives after its round has closed.
        every: Local budget between two exchanges; None leaves it to the scripts.
        exchange: Which tensors travel; None leaves it to the scripts.
        keep_local: Name patterns of tensors that never leave a site.
        optimizer_state: What happens to optimizer state at an exchange; None leaves it to the scripts.
        filters: Filters of what travels, in order; each a table of settings.
        initial: Path of a safetensors file with the initial model; None takes the first site's weights.
        best_metric: Metric that decides which round is the best; None leaves it to the sites' `Terms`.
        best_mode: Whether lower or higher is better; None leaves it to the sites' `Terms`.
        seed: Seed of everything random in the run; None means 0 where a number is needed.
        exact_restart: Whether a restarted site must end with the same bits.
        rejoin_s: Seconds to wait for a site whose connection is gone before `min_sites` decides.
        app: Name of the app that the sites run; the policy of a site maps it to a command.
        submitted_by: Identity (URI) of who submitted the job; "" in a simulation.
        fraction: Share of the sites that take part in a round, above 0 and at most 1.
        site_weights: Site name -> factor of its weight; 1 for sites not named.
        patience: Rounds without a better metric after which the run ends; None leaves it to the sites' `Terms`.
        min_delta: Least difference of the metric that counts as better, for `patience`.
        cross_site: Whether every site evaluates every site's model after the last round.
        durability: Whether acknowledged updates survive the death of processes, or also a power failure.
        trainings: Largest number of trainings in a site's script; None for any number.
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
    trainings: int | None = None

    @property
    def sites_per_round(self) -> int:
        """Number of sites in a round: `fraction` of all sites, rounded up."""
        return max(1, math.ceil(self.fraction * len(self.sites) - 1e-9))


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: a line of events.jsonl, and what listeners such as the live table receive.

    The kinds of events:

    - "joined", "registered", "left", "script_ended": a site joined, finished its handshake, left, or ended its script.
    - "started", "finished", "failed": the run began, ended, or failed.
    - "round_started", "round_finished", "round_dropped": a round was opened, committed, or not needed after all.
    - "task_sent", "update": a site received a task, or its update arrived.
    - "aggregator": under swarm, a site was chosen to aggregate the round.
    - "report", "scored": one site evaluated the model of `round`, or all of them did. "cross_score", "cross_site": a
      site evaluated another site's model, or all did (with the matrix).
    - "warning": something may be wrong with the run; `text` says what, in words.
    - "starting", "restarted", "exited": a site's process in a simulation.

    Attributes:
        kind: What happened.
        time: When, in seconds since the epoch.
        round: Number of the round, 0 if the event belongs to none.
        site: Name of the site, "" if the event belongs to none.
        data: Further facts of this kind of event; JSON values.
    """

    kind: str
    time: float
    round: int = 0
    site: str = ""
    data: Settings = field(default_factory=dict)


Listener: TypeAlias = Callable[[Event], None]
"""A function that receives every event of a run, in order. The server calls it from a thread for events alone."""


class Aggregator(Protocol):
    """The sum of one round's updates, which arrive in the fixed order of the job's sites."""

    def add(self, update: Update) -> None:
        """Add one update.

        Args:
            update: The update. Its arrays are borrowed until `result` returns. They are memory-mapped files of the
                server, so keeping references to them costs no memory.
        """
        ...

    def result(self) -> tuple[Arrays, Arrays]:
        """Return the next global model, after the last `add`.

        Returns:
            The arrays and the extras of the model, in the buffers from the strategy's `allocate`.

        Raises:
            RoundFailedError: These updates make no model. The server opens the round again.
        """
        ...


Allocate: TypeAlias = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]
"""allocate(arrays, extras) -> writable arrays of the same names, shapes and dtypes: the next model's own buffer."""


@dataclass(frozen=True)
class RoundPlan:
    """Who takes part in a round, and how many updates close it.

    Attributes:
        sites: Names of the sites that train; None for all that are present.
        answers: Number of updates that the round waits for; None for those of all its sites.
    """

    sites: tuple[str, ...] | None = None
    answers: int | None = None


@dataclass(frozen=True)
class ServerState:
    """Arrays that a strategy carries from round to round beside the weights, such as the moments of an optimizer.

    Attributes:
        extras: Extras of the current global model, which the sites received with it.
        previous: Arrays from `allocate_next` as the last committed round left them; empty in the first round.
            Read-only.
        allocate_next: Function from example arrays to writable arrays of the same names, shapes and dtypes. An
            aggregator fills them before `result` returns. They are committed together with the next model, never leave
            the server, and are `previous` in the next round.
        sites: Names of all sites of the job, in its order, whether or not they take part in the round.

    Example:
        ```python
        moments = state.allocate_next(base)
        for name, weights in base.items():
            moments[name][...] = state.previous.get(name, np.zeros_like(weights))
        ```
    """

    extras: Arrays = field(default_factory=dict)
    previous: Arrays = field(default_factory=dict)
    allocate_next: Callable[[Arrays], Arrays] = dict
    sites: tuple[str, ...] = ()


class Strategy(Protocol):
    """How the updates of a round become the next global model. Runs at the server and uses NumPy alone.

    `plan_round`, `scored_by` and `configure` must return the same for the same arguments, since a restarted server asks
    again.

    Attributes:
        content: What the arrays of updates hold. Tensors of "weights" are those of the handshake. Tensors of
            "encoded" have the same names and dtypes; their shapes may change as `agreed_shape` allows.
        initial: Where the initial model comes from: the first site, or all sites through an aggregator of round 0,
            whose base model is empty.
        weighted: Whether `site_weights` of the job have an effect.
        partial: Whether updates may lack tensors, each of which is then combined over the sites that send it.
        needs_steps: Whether every update must state its number of optimizer steps.
    """

    content: ClassVar[Content]
    initial: ClassVar[Literal["first", "all"]]
    weighted: ClassVar[bool]
    partial: ClassVar[bool]
    needs_steps: ClassVar[bool]

    @property
    def linear(self) -> bool:
        """Whether the weighted mean of the updates is all that the strategy needs from them.

        That mean can then be computed elsewhere, for example from encrypted updates.
        """
        ...

    @property
    def requires(self) -> frozenset[str]:
        """Capabilities that the adapter of every site must declare; "weights" means updates of content "weights"."""
        ...

    @property
    def relayed(self) -> bool:
        """Whether a site runs the aggregator (swarm), so that the server receives its result and not the updates."""
        ...

    @property
    def spec(self) -> str:
        """The strategy as text, as a job names it: "name:argument=value,..."."""
        ...

    @property
    def buffer(self) -> int | None:
        """Number of updates the server collects before it makes a new global model; None for synchronous rounds.

        With a number, sites never wait for each other, and their updates have content "delta".
        """
        ...

    def check_sites(self, fewest: int) -> None:
        """Check that a round can work with few updates.

        Args:
            fewest: Least number of updates with which the job lets a round close.

        Raises:
            ConfigError: The strategy needs more.
        """
        ...

    def plan_round(self, round: int, present: Sequence[str]) -> RoundPlan:
        """Choose the sites of a round.

        Args:
            round: Number of the round, from 1.
            present: Names of the sites that are connected, in the job's order.

        Returns:
            Who takes part, and how many updates close the round.
        """
        ...

    def scored_by(self, site: str, models: Sequence[str]) -> Sequence[str]:
        """Choose the models that a site evaluates after the last round, in jobs with `cross_site`.

        Args:
            site: Name of the site.
            models: "global", and the names of the sites whose own models exist.

        Returns:
            A subset of `models`, in the order in which the site gets them.
        """
        ...

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the part of a tensor's shape that must be equal at all sites and in all updates.

        Args:
            name: Name of the tensor.
            shape: Its shape at one site.

        Returns:
            The shape, with -1 for dimensions that may differ.
        """
        ...

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return the settings that travel with the tasks of a round.

        Args:
            round: Number of the round; 0 for the initial model.
            sites: Names of the sites that take part.

        Returns:
            JSON values. They become the `config` of every task of the round.
        """
        ...

    def check(self, update: Update) -> None:
        """Check an update before it is accepted. May be called by several threads at a time.

        Args:
            update: An update that fits the model.

        Raises:
            UpdateRefusedError: No aggregator should see this update. Its site receives the reason.
        """
        ...

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Begin the sum of a round. Called again for the same round if the sum has to start over.

        Args:
            base: The current global model. Read-only.
            allocate: Makes the buffers of the next model.
            config: What `configure` returned for this round.
            state: Arrays from earlier rounds.

        Returns:
            A new aggregator.
        """
        ...

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """Return a global model in a file format of its own.

        Args:
            arrays: The model.

        Returns:
            The file's name and bytes; None for a plain safetensors file.
        """
        ...
