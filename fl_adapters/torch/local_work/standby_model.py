"""A second set of weights and optimizer state for a torch module, for a site's personal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.local_work.backend import StandbyModel
from fl_adapters.participant.state_file import State
from fl_adapters.torch.local_work.correction import plain
from fl_adapters.torch.restart import load_tensors, packed, packed_optimizer, packed_tensors, states_of, unpacked
from fl_adapters.torch.selection import NamedTensors
from fl_adapters.torch.state import as_array, as_tensor
from fl_runtime.types import Arrays

_STEP = "step"


class TorchStandbyModel(StandbyModel):
    """A `StandbyModel` for a torch module, its optimizers, and what they train beside the module.

    Weights are copied into the live tensors; the optimizers' state tensors change hands without a copy. Learning
    rates belong to the training loop, so both sets use the same.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Any], beside: Mapping[str, Tensor]) -> None:
        self._live = {
            name: tensor
            for name, tensor in NamedTensors.of(module, beside).tensors.items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        self._weights = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._optimizers = [plain(optimizer) for optimizer in optimizers]
        self._states: list[dict[Any, Any]] = [{} for _ in self._optimizers]
        self._steps: list[list[Any]] = [[_zero(g.get(_STEP)) for g in o.param_groups] for o in self._optimizers]

    @torch.no_grad()
    def swap(self) -> None:
        for name, tensor in self._live.items():
            live_weights = tensor.detach().clone()
            tensor.copy_(self._weights[name])
            self._weights[name] = live_weights
        for index, optimizer in enumerate(self._optimizers):
            live_state = dict(optimizer.state)
            optimizer.state.clear()
            optimizer.state.update(self._states[index])
            self._states[index] = live_state
            for group, step in zip(optimizer.param_groups, self._swap_steps(index, optimizer), strict=True):
                if _STEP in group:  # some optimizers count steps in the parameter group
                    group[_STEP] = step

    @torch.no_grad()
    def weights(self) -> Arrays:
        return {name: as_array(tensor.cpu()) for name, tensor in self._weights.items()}

    @torch.no_grad()
    def set_weights(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._weights[name].copy_(as_tensor(array))

    def state_dict(self) -> State:
        states = [packed_optimizer(o, s)[1] for o, s in zip(self._optimizers, self._states, strict=True)]
        return {"weights": packed_tensors(self._weights), "states": states, "steps": packed(self._steps)}

    def load_state_dict(self, state: State) -> None:
        load_tensors(self._weights, state["weights"])
        self._states = [states_of(o, s) for o, s in zip(self._optimizers, state["states"], strict=True)]
        self._steps = unpacked(state["steps"])

    def _swap_steps(self, index: int, optimizer: Any) -> list[Any]:
        """Keep the optimizer's step counters, and return those that were kept until now."""
        steps, self._steps[index] = self._steps[index], [group.get(_STEP) for group in optimizer.param_groups]
        return steps


def _zero(step: Any) -> Any:
    return torch.zeros_like(step) if isinstance(step, Tensor) else step and 0  # None, for no counter, stays None
