"""The trainer's model and optimizer as the federation sees them, on every rank."""

from __future__ import annotations

from typing import Any

from torch import nn

from fl_adapters import torch_ranks
from fl_adapters.options import SiteSettings
from fl_adapters.torch_state import TorchState
from fl_adapters.torch_state_optimizer import OptimizerState
from fl_runtime.types import Arrays, Task


class LiveModel:
    """Holds the live tensors, so it belongs to one `train()` call and is never copied along with the callback."""

    def __init__(self, model: nn.Module, optimizer: Any, settings: SiteSettings) -> None:
        self.state = TorchState(model, settings.exchange, settings.keep_local)
        self._policy = settings.optimizer_state
        self._moments = OptimizerState(optimizer, self.state.tensors)
        if self._policy == "average":
            self._moments.refuse_if_not_averageable()

    def arrays(self) -> Arrays:
        """What travels, on rank 0; empty on the others."""
        if torch_ranks.is_rank_zero() or self.state.sharded:
            return self.state.get_state()
        return {}

    def moments(self) -> Arrays:
        """The optimizer moments that travel beside the weights; empty unless they are averaged."""
        return self._moments.get() if self._policy == "average" and torch_ranks.is_rank_zero() else {}

    def receive(self, task: Task | None, *, keep_weights: bool = False) -> None:
        """Take rank 0's task in, on every rank: the weights in place, then the policy for the optimizer."""
        self.load(None if task is None else {} if keep_weights else task.arrays, checked=not keep_weights)
        if self._policy == "reset":
            self._moments.reset()
        if self._policy == "average":
            specs, moments = torch_ranks.share_arrays(task.extras if task else None)
            if specs:
                self._moments.set(dict(moments))

    def load(self, arrays: Arrays | None, *, checked: bool = True) -> None:
        """Set rank 0's `arrays` on every rank, in place."""
        specs, shared = torch_ranks.share_arrays(arrays)
        if checked:
            self.state.check(specs)
        for name, array in shared:
            self.state.copy_in(name, array)
