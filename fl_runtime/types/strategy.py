"""The contract of strategies and aggregators: how the updates of a round become the next global model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeAlias

from fl_runtime.types.messages import Arrays, Content, Settings, Update


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
        max_share: Largest share of one site in the weights of an aggregate; None for no cap. The weights of a round's
            updates are within it already.

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
    max_share: float | None = None


class Strategy(Protocol):
    """How the updates of a round become the next global model. Runs at the server and uses NumPy alone.

    `plan_round`, `scored_by` and `configure` must return the same for the same arguments, since a restarted server asks
    again.

    Attributes:
        content: What the arrays of updates hold. Tensors of "weights" are those of the handshake. Tensors of
            "encoded" have the same names and dtypes; their shapes may change as `agreed_shape` allows.
        initial: Where the initial model comes from: the first site, or all sites through an aggregator of round 0,
            whose base model is empty. With "none" it is zeros, and no site is asked.
        open_ended: Whether the run has no number of rounds, since `finished` decides when it ends. The job's settings
            about models then have no effect, see `RunSettings.without_model`.
        weighted: Whether `site_weights` of the job have an effect.
        scalable: Whether the server can scale down the weight of one update, so that a cap on shares holds.
        summable: Whether the sum of the updates, or their weighted mean, makes the same model as the updates.
        partial: Whether updates may lack tensors, each of which is then combined over the sites that send it.
        needs_steps: Whether every update must state its number of optimizer steps.
        shows: What of a single site's update other sites get: nothing, the whole "updates" (the aggregator of a swarm
            does), or "trees", which includes gradient histograms.
    """

    content: ClassVar[Content]
    initial: ClassVar[Literal["first", "all", "none"]]
    open_ended: ClassVar[bool]
    weighted: ClassVar[bool]
    scalable: ClassVar[bool]
    summable: ClassVar[bool]
    partial: ClassVar[bool]
    needs_steps: ClassVar[bool]
    shows: ClassVar[Literal["", "trees", "updates"]]

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

    def cohort(self, updates: int) -> int:
        """Return how many of a round's updates make the next model.

        Args:
            updates: Number of updates in the round.

        Returns:
            All of them, or fewer if the strategy chooses among them.
        """
        ...

    def weights_of(self, updates: Sequence[Update]) -> Sequence[float]:
        """Return the weights with which updates count in the next model. Only a cap on shares asks for them.

        Args:
            updates: The updates of a round, or of a buffer. Their arrays may be encoded.

        Returns:
            A weight for each update, at least 0.
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

    def finished(self, arrays: Arrays) -> bool:
        """Return whether the run ends with a global model, before its last round or without a number of rounds.

        Args:
            arrays: The model.

        Returns:
            Whether no further round is opened.
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
