"""The contract of a framework adapter: state in and out of a live model, and optional further protocols."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fl_adapters.participant.state_file import State
from fl_runtime.types import Arrays


@runtime_checkable
class Adapter(Protocol):
    """Reads and writes the state of a live model.

    Example:
        ```python
        from fl_runtime.errors import StateMismatchError


        class DictAdapter:
            capabilities = frozenset()

            def __init__(self, model):
                self.model = model

            def get_state(self):
                return dict(self.model)

            def set_state(self, arrays):
                if arrays.keys() != self.model.keys():
                    raise StateMismatchError("the tensors differ", where=", ".join(arrays.keys() ^ self.model.keys()))
                for name, array in arrays.items():
                    self.model[name][...] = array
        ```
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of the optional protocols that the adapter also supports.

        Known names are "optimizer_state", "gradient-correction" and "personal-model". The handshake compares them with
        what the job's strategy requires.
        """
        ...

    def get_state(self) -> Arrays:
        """Return the tensors that travel.

        Returns:
            Tensor name -> host array, in a fixed order. Borrowed until the next call.
        """
        ...

    def set_state(self, arrays: Arrays) -> None:
        """Copy arrays into the live model in place. Parameters keep their identity and their device.

        Args:
            arrays: Tensors with the names, shapes and dtypes of `get_state`. Borrowed for the call.

        Raises:
            StateMismatchError: The tensors differ from those of the model. The message has a line per tensor.
                Nothing has been changed.
        """
        ...


@runtime_checkable
class OptimizerState(Protocol):
    """Reads and writes an optimizer's moments. Optional; the capability is "optimizer_state"."""

    def get(self) -> Arrays:
        """Return the moments.

        Returns:
            "<moment>/<parameter>" -> host array. Borrowed until the next call.
        """
        ...

    def set(self, arrays: Arrays) -> None:
        """Copy moments into the live optimizer.

        Args:
            arrays: Moments under the names of `get`. Borrowed for the call.
        """
        ...

    def reset(self) -> None:
        """Set all moments and the counter for bias correction to zero."""
        ...


class Snapshot(Protocol):
    """Saves and loads all state of a site that outlives a round and does not travel.

    Optional; the capability is `fl_runtime.capabilities.EXACT_RESTART`.
    """

    def save(self) -> State:
        """Return the state between two rounds.

        Returns:
            Nested lists and dicts of plain values and arrays. Borrowed until training continues.

        Raises:
            ConfigError: A part of the state cannot be saved.
        """
        ...

    def load(self, state: State) -> None:
        """Continue from a state that `save` returned in an earlier process of this site.

        Called before the global weights are set.

        Args:
            state: The saved state. The callee owns its arrays.
        """
        ...
