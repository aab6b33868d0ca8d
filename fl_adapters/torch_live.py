"""A live torch model and its optimizers as the federation sees them, on every rank of a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fl_adapters import torch_ranks
from fl_adapters.options import SiteSettings
from fl_adapters.torch_local import LocalWork
from fl_adapters.torch_state import TorchState, is_sharded
from fl_adapters.torch_state_agreement import agreement
from fl_adapters.torch_state_optimizer import OptimizerState
from fl_runtime.aggregation.local_terms import GRADIENT_CORRECTION, PERSONAL_MODEL, without_control
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task


class LiveModel:
    """Weights and moments out and in, by `settings`. Holds the live tensors: it belongs to one training run and is
    never copied along with a callback.

    Calls are collective: every rank makes them, with rank 0's task or None. Raises ConfigError, when made, for a
    model that cannot travel and for optimizers whose state cannot be averaged where `settings` ask for it.

    local: what the job's strategy asks of local training.
    """

    capabilities = frozenset({"optimizer_state", GRADIENT_CORRECTION, PERSONAL_MODEL})

    def __init__(self, model: nn.Module, optimizers: Sequence[Any], settings: SiteSettings) -> None:
        self._model, self._settings = model, settings
        self.state = TorchState(model, settings.exchange, settings.keep_local)
        self._final: Arrays | None = None
        self._moments = [OptimizerState(optimizer, self.state.tensors) for optimizer in optimizers]
        self.local = LocalWork(model, optimizers, self.state, settings.phases)
        if settings.optimizer_state == "average":
            self._refuse_shared_parameters()
            for moments in self._moments:
                moments.refuse_if_not_averageable()

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
        if not average or not torch_ranks.is_rank_zero():
            return {}
        return {name: array for moments in self._moments for name, array in moments.get().items()}

    def receive(self, task: Task | None) -> None:
        """Take rank 0's task in, on every rank: the weights in place, then the policy for the optimizers, then what the
        strategy asks of the round."""
        self.load(task.arrays if task else None)
        if self._settings.optimizer_state == "reset":
            for state in self._moments:
                state.reset()
        if self._settings.optimizer_state == "average":
            moments = {name: task.extras[name] for name in without_control(task.extras)} if task else None
            specs, shared = torch_ranks.share_arrays(moments)
            if specs:
                self._set_moments(dict(shared))
        self.local.begin(task, whole=True)

    def resume(self, task: Task | None) -> None:
        """Go on in the middle of rank 0's task, on every rank, with the weights and moments that are there."""
        self.local.begin(task, whole=False)

    def load(self, arrays: Arrays | None) -> None:
        """Set rank 0's `arrays` on every rank, in place."""
        specs, shared = torch_ranks.share_arrays(arrays)
        self.state.check(specs)
        for name, array in shared:
            self.state.copy_in(name, array)

    def receive_final(self, task: Task | None) -> None:
        """Take in the final weights, and remember them: a framework may load others before training ends."""
        self.load(task.arrays if task else None)
        self._final = self.state.get_state()

    def restore_final(self) -> None:
        """Back to the final weights, on every rank."""
        assert self._final is not None
        self.state.set_state(self._final)

    def _set_moments(self, arrays: Arrays) -> None:
        left = dict(arrays)
        for moments in self._moments[1:]:
            moments.set({name: left.pop(name) for name in arrays if name.partition("/")[2] in moments.names})
        if self._moments:
            self._moments[0].set(left)  # the rest, and what belongs to none of them: that is refused

    def _refuse_shared_parameters(self) -> None:
        seen = set[str]()
        for moments in self._moments:
            if shared := seen & moments.names:
                raise ConfigError(
                    "optimizer_state='average' cannot tell the moments of two optimizers of one parameter apart",
                    where=sorted(shared)[0],
                    fix="use optimizer_state='keep' or 'reset', or give each optimizer parameters of its own",
                )
            seen |= moments.names
