"""What the plain loops of PyTorch share, with which torch trainers are compared in the conformance suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fl_adapters.testing import Correct


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    """Return a copy of every tensor of the module's state."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


class PlainTorch:
    """Weights, optimizer state and corrected gradients of one site's loop. Subclasses train."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    correct: Correct | None = None

    def weights(self) -> dict[str, np.ndarray]:
        return weights(self.module)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})

    def reset_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def exchange_optimizer(self, state: Any) -> Any:
        before = dict(self.optimizer.state)
        self.optimizer.state.clear()
        self.optimizer.state.update(state or {})
        return before

    def correct_gradients(self) -> None:
        """Replace every gradient by what `correct` makes of it, if it is set."""
        if self.correct is None:
            return
        for name, parameter in self.module.named_parameters():
            gradient = self.correct(name, parameter.detach().numpy(), parameter.grad.numpy().copy())
            parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
