"""A site's personal model beside the global one, in the same torch module and the same training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.outputs import PERSONAL_FILE
from fl_adapters.participant.state_file import State
from fl_adapters.torch.correction import plain
from fl_adapters.torch.restart import load_tensors, packed, packed_optimizer, packed_tensors, states_of, unpacked
from fl_adapters.torch.state import NamedTensors, as_array, as_tensor, differences, specs_of
from fl_runtime.errors import StateMismatchError
from fl_runtime.store.tensorfile import read_tensors, write_tensors

_STEP = "step"


class PersonalModel:
    """A second set of weights and of optimizer state. One set is in the module and its optimizers, the other here.

    The weights are all that training changes: trained parameters and buffers, also those that do not travel. Swapping
    writes into the live tensors; the optimizers' state tensors change hands. It begins as a copy of the model as it
    is, with an optimizer that has made no step. Learning rates belong to the training loop, and to both.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Any]) -> None:
        self._live = {
            name: tensor
            for name, tensor in NamedTensors.of(module).tensors.items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        self._other = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._optimizers = [plain(optimizer) for optimizer in optimizers]
        self._states: list[dict[Any, Any]] = [{} for _ in self._optimizers]
        self._steps: list[list[Any]] = [[_nothing(g.get(_STEP)) for g in o.param_groups] for o in self._optimizers]
        self.active = False

    @torch.no_grad()
    def swap(self) -> None:
        """The set in the module goes out, the other comes in."""
        for name, tensor in self._live.items():
            leaving = tensor.detach().clone()
            tensor.copy_(self._other[name])
            self._other[name] = leaving
        for index, optimizer in enumerate(self._optimizers):
            leaving_state = dict(optimizer.state)
            optimizer.state.clear()
            optimizer.state.update(self._states[index])
            self._states[index] = leaving_state
            for group, step in zip(optimizer.param_groups, self._swapped_steps(index, optimizer), strict=True):
                if _STEP in group:  # optimizers that count in the group
                    group[_STEP] = step
        self.active = not self.active

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The personal model is in the module within this block, wherever it was."""
        swaps = not self.active
        if swaps:
            self.swap()
        try:
            yield
        finally:
            if swaps:
                self.swap()

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Keep the weights for another process of this site; while the global model is in the module."""
        write_tensors(folder / PERSONAL_FILE, {name: as_array(tensor.cpu()) for name, tensor in self._other.items()})

    @torch.no_grad()
    def load(self, folder: Path) -> bool:
        """The weights that `save` kept; False if there are none. The optimizer begins anew.

        Raises StateMismatchError for those of another model.
        """
        if not (folder / PERSONAL_FILE).exists():
            return False
        arrays = read_tensors(folder / PERSONAL_FILE)
        wanted = specs_of({name: as_array(tensor.cpu()) for name, tensor in self._other.items()})
        if lines := differences(wanted, specs_of(arrays)):
            raise StateMismatchError(
                "the personal model that was kept here is of another model:\n" + "\n".join(lines),
                where=str(folder / PERSONAL_FILE),
                fix="delete it, or build the model as before",
            )
        for name, array in arrays.items():
            self._other[name].copy_(as_tensor(array))
        return True

    def kept(self) -> State:
        """The weights and the optimizers' state, for exact restarts; while the global model is in the module."""
        states = [packed_optimizer(o, s)[1] for o, s in zip(self._optimizers, self._states, strict=True)]
        return {"weights": packed_tensors(self._other), "states": states, "steps": packed(self._steps)}

    def go_on(self, state: State) -> None:
        """From what `kept` gave to another process of this site."""
        load_tensors(self._other, state["weights"])
        self._states = [states_of(o, s) for o, s in zip(self._optimizers, state["states"], strict=True)]
        self._steps = unpacked(state["steps"])

    def _swapped_steps(self, index: int, optimizer: Any) -> list[Any]:
        coming, self._steps[index] = self._steps[index], [group.get(_STEP) for group in optimizer.param_groups]
        return coming


def _nothing(step: Any) -> Any:
    return torch.zeros_like(step) if isinstance(step, Tensor) else step and 0
