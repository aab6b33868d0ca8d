"""The contract of a framework adapter: two verbs, and what it can do beyond them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fl_adapters.participant.state_file import State
from fl_runtime.types import Arrays


@runtime_checkable
class Adapter(Protocol):
    """State in and out of a live model.

    capabilities: names of optional protocols that it also has ("optimizer_state", "gradient-correction",
    "personal-model"); the handshake compares them with what the job's strategy needs.
    """

    @property
    def capabilities(self) -> frozenset[str]: ...

    def get_state(self) -> Arrays:
        """What travels, as host arrays in a fixed order; borrowed until the next call."""
        ...

    def set_state(self, arrays: Arrays) -> None:
        """Copy into the live model in place: parameters keep their identity and device.

        Raises StateMismatchError, with a line per tensor, before anything is changed.
        """
        ...


@runtime_checkable
class OptimizerState(Protocol):
    """Optional ("optimizer_state"): the optimizer's moments, keyed "<moment>/<parameter>"."""

    def get(self) -> Arrays: ...
    def set(self, arrays: Arrays) -> None: ...
    def reset(self) -> None: ...


class Snapshot(Protocol):
    """Optional (fl_runtime.types.EXACT_RESTART): all of a site's state that outlives a round and does not travel."""

    def save(self) -> State:
        """The state between two rounds. Borrowed until the training goes on. ConfigError where it cannot be kept."""
        ...

    def load(self, state: State) -> None:
        """Go on from what `save` gave in another process of this site, before the global weights are set."""
        ...
