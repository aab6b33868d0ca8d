"""Gradient corrections and personal models (FedProx, SCAFFOLD, Ditto) for a live torch model, on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.local_work.backend import LocalBackend, StepRecord
from fl_adapters.torch.local_work.correction import GradientCorrection, StepMeter, is_plain_sgd
from fl_adapters.torch.local_work.standby_model import TorchStandbyModel
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.ranks.shards import copy_full, is_sharded
from fl_adapters.torch.state import TorchState, as_tensor
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays


class TorchLocalBackend(LocalBackend):
    """A `LocalBackend` for a torch module and its optimizers.

    `share`, `set_anchors` and `add_offsets` are collective: rank 0's arrays reach every rank.

    Attributes:
        gradients: The correction, for the adapter to connect with the trainer's optimizer steps.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Any], state: TorchState, beside: Mapping[str, Tensor]
    ) -> None:
        """Correct nothing as yet.

        Args:
            module: The live model.
            optimizers: All optimizers that train it.
            state: The tensors that travel.
            beside: Live tensors of other modules that are trained too, by name.
        """
        self._module, self._optimizers, self._beside = module, optimizers, beside
        self._parameters = {
            name: tensor
            for name, tensor in state.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }
        self.gradients = GradientCorrection(self._parameters)
        self._anchors: dict[str, Tensor] = {}
        self._meter: StepMeter | None = None

    @property
    def names(self) -> Collection[str]:
        return self._parameters.keys()

    @property
    def steps(self) -> int:
        return self.gradients.steps

    def share(self, value: Any) -> Any:
        return ranks.share(value)

    def set_anchors(self, weights: Arrays | None, *, loaded: bool) -> None:
        if loaded:
            self._anchors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            return
        named = None if weights is None else {name: weights[name] for name in self.names}
        parts = self._own_parts(named)
        self._anchors = {name: part if is_sharded(part) else part.clone() for name, part in parts.items()}

    def pull_to_anchors(self, mu: float) -> None:
        self.gradients.begin(mu=mu, anchors=self._anchors)

    def add_offsets(self, offsets: Arrays | None) -> None:
        tensors = self._own_parts(offsets)
        self._meter = StepMeter(gradients=not all(is_plain_sgd(optimizer) for optimizer in self._optimizers))
        if self._meter.gradients:
            self._refuse_shards("SCAFFOLD with another optimizer than plain SGD", "use torch.optim.SGD, or fedprox")
        self.gradients.begin(offsets=tensors, meter=self._meter)

    def leave_gradients(self) -> None:
        self.gradients.end()

    def step_record(self) -> StepRecord:
        meter = self._meter
        assert meter is not None
        return StepRecord(mean_gradients=meter.means()) if meter.gradients else StepRecord(rates=meter.rates())

    def standby_model(self) -> TorchStandbyModel:
        self._refuse_shards("a personal model", "use a strategy without one, such as fedavg or fedprox")
        return TorchStandbyModel(self._module, self._optimizers, self._beside)

    def _own_parts(self, arrays: Arrays | None) -> dict[str, Tensor]:
        """Rank 0's arrays, of which each rank keeps what it has of the parameters: parts, or views. Collective."""
        parts: dict[str, Tensor] = {}
        for name, array in ranks.share_arrays(arrays)[1]:
            assert array is not None
            value, parameter = as_tensor(array), self._parameters[name]
            if is_sharded(parameter):
                parts[name] = torch.zeros_like(parameter, dtype=value.dtype)
                copy_full(parts[name], value)
            else:
                parts[name] = value
        return parts

    def _refuse_shards(self, what: str, fix: str) -> None:
        if any(is_sharded(parameter) for parameter in self._parameters.values()):
            raise ConfigError(
                f"{what} does not work with a sharded model", where="strategy", fix=f"{fix}, or train under DDP"
            )

    def close(self) -> None:
        self.gradients.close()
