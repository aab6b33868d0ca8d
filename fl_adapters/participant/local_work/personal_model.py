"""A site's personal model (Ditto), trained in the same live model as the global one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_adapters.participant.local_work.backend import StandbyModel
from fl_adapters.participant.outputs import PERSONAL_FILE
from fl_adapters.participant.state_file import State
from fl_runtime.errors import StateMismatchError
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.wire.manifest import Manifest, differences

_SHOWN_DIFFERENCES = 20


class PersonalModel:
    """The personal model: either active, in the live model, or on standby while the global model is there.

    Attributes:
        active: Whether the personal model is in the live model.
    """

    def __init__(self, standby: StandbyModel) -> None:
        self._standby = standby
        self.active = False

    def swap(self) -> None:
        """Exchange the personal and the global model."""
        self._standby.swap()
        self.active = not self.active

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Keep the personal model in the live model within this block; afterwards all is as before."""
        swaps = not self.active
        if swaps:
            self.swap()
        try:
            yield
        finally:
            if swaps:
                self.swap()

    def save(self, folder: Path) -> None:
        """Write the weights for a later process of this site. The global model must be in the live model."""
        write_tensors(folder / PERSONAL_FILE, self._standby.weights())

    def load(self, folder: Path) -> None:
        """Continue from the weights that `save` wrote, if there are any. The optimizer starts from scratch.

        Raises:
            StateMismatchError: If the weights belong to another model.
        """
        path = folder / PERSONAL_FILE
        if not path.exists():
            return
        arrays = read_tensors(path)
        if lines := differences(Manifest.of(self._standby.weights()), Manifest.of(arrays)):
            more = len(lines) - _SHOWN_DIFFERENCES
            raise StateMismatchError(
                "the personal model saved here belongs to another model:\n"
                + "\n".join([*lines[:_SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]),
                where=str(path),
                fix="delete the file, or build the same model as before",
            )
        self._standby.set_weights(arrays)

    def state_dict(self) -> State:
        """Weights and optimizer state for an exact restart. The global model must be in the live model."""
        return self._standby.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned in an earlier process of this site."""
        self._standby.load_state_dict(state)
