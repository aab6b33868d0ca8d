"""The trainer's model and optimizer as the federation sees them, on every rank."""

from __future__ import annotations

from typing import Any

from torch import nn

from fl_adapters import torch_ranks
from fl_adapters.options import SiteSettings
from fl_adapters.torch_state import TorchState, is_sharded
from fl_adapters.torch_state_agreement import agreement
from fl_adapters.torch_state_optimizer import OptimizerState
from fl_runtime.types import Arrays, Task

from .export import Exporter


class LiveModel:
    """Holds the live tensors, so it belongs to one `train()` call and is never copied along with the callback."""

    capabilities = frozenset({"optimizer_state"})

    def __init__(self, model: nn.Module, optimizer: Any, settings: SiteSettings) -> None:
        self._model, self._settings = model, settings
        self.state = TorchState(model, settings.exchange, settings.keep_local)
        self._moments = OptimizerState(optimizer, self.state.tensors)
        if settings.optimizer_state == "average":
            self._moments.refuse_if_not_averageable()
        self._final: Arrays | None = None

    def agreement(self, framework: str) -> dict[str, str]:
        """What must be equal at all sites; on rank 0, empty on the others."""
        gathers = any(is_sharded(parameter) for parameter in self._model.parameters())
        if not (torch_ranks.is_rank_zero() or gathers):
            return {}
        exchange, keep_local = self._settings.exchange, self._settings.keep_local
        return agreement(self._model, framework=framework, exchange=exchange, keep_local=keep_local)

    def arrays(self) -> Arrays:
        """What travels, on rank 0; empty on the others. Borrowed until the next call."""
        return self.state.get_state() if torch_ranks.is_rank_zero() else {}

    def moments(self) -> Arrays:
        """The optimizer moments that travel beside the weights; empty unless they are averaged."""
        average = self._settings.optimizer_state == "average"
        return self._moments.get() if average and torch_ranks.is_rank_zero() else {}

    def receive(self, task: Task | None) -> None:
        """Take rank 0's task in, on every rank: the weights in place, then the policy for the optimizer."""
        self.load(task.arrays if task else None)
        if self._settings.optimizer_state == "reset":
            self._moments.reset()
        if self._settings.optimizer_state == "average":
            specs, moments = torch_ranks.share_arrays(task.extras if task else None)
            if specs:
                self._moments.set(dict(moments))

    def load(self, arrays: Arrays | None) -> None:
        """Set rank 0's `arrays` on every rank, in place."""
        specs, shared = torch_ranks.share_arrays(arrays)
        self.state.check(specs)
        for name, array in shared:
            self.state.copy_in(name, array)

    def receive_final(self, task: Task | None) -> None:
        """Take in the final weights, and remember them: HF may load others before training ends."""
        self.load(task.arrays if task else None)
        self._final = self.state.get_state()

    def restore_final(self) -> None:
        """Back to the final weights, on every rank."""
        assert self._final is not None
        self.state.set_state(self._final)

    def exporter(self, processing_class: Any) -> Exporter:
        """Writes the results."""
        return Exporter(self._model, processing_class, self.state)
