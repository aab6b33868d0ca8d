"""What travels between the server and the sites: tasks, updates, reports, and the events of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

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
TaskKind = Literal["initial", "train", "final", "best", "evaluate", "evaluated", "share", "aggregate", "secure_sum"]
"""What a task asks for; see `Task`."""

PARTICIPANTS = "participants"
"""Setting of a task: how many sites take part in its round."""
UPDATES = "updates"
"""Setting of a task: of how many sites' updates its model was made; absent for an initial model."""


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
    - "secure_sum" (with `secure_sum` only): answer the step `config["step"]` of the masked sum.

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
        train_s: Seconds from the arrival of the task to this update, without calls to the server; 0 if unknown.
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
    train_s: float = 0.0

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
class Event:
    """Something that happened in a run: a line of events.jsonl, and what listeners such as the live table receive.

    The kinds of events:

    - "joined", "registered", "left", "script_ended": a site joined, finished its handshake, left, or ended its script.
    - "started", "finished", "failed": the run began, ended, or failed.
    - "round_started", "round_finished", "round_dropped": a round was opened, committed, or not needed after all.
    - "task_sent", "update": a site received a task, or its update arrived.
    - "steps": how far a site's local training is: `done` of `total` steps (None if unknown), after `train_s` seconds.
      It is shown while it is new, and neither journaled nor written to events.jsonl.
    - "aggregator": under swarm, a site was chosen to aggregate the round.
    - "report", "scored": one site evaluated the model of `round`, or all of them did. "cross_score", "cross_site": a
      site evaluated another site's model, or all did (with the matrix).
    - "files": a site sent the small files that go with the final model, such as config.json; `status` says what became
      of them: "kept", "same" as those that are kept, or "different".
    - "waiting", "quorum": too few sites are connected, and which ones are waited for; enough are there again.
    - "log": a line of a site's own log, which its policy shares; `level` and `text`.
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
