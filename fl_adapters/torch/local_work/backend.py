"""Gradient corrections and personal models (FedProx, SCAFFOLD, Ditto) for a live torch model, on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fl_adapters.participant.local_work.backend import LocalBackend, StepRecord
from fl_adapters.torch import ranks
from fl_adapters.torch.local_work.correction import GradientCorrection, StepMeter, is_plain_sgd
from fl_adapters.torch.local_work.standby_model import TorchStandbyModel
from fl_adapters.torch.state import TorchState, as_tensor
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
        _, shared = ranks.share_arrays(None if weights is None else {name: weights[name] for name in self.names})
        self._anchors = {name: as_tensor(array).clone() for name, array in shared}

    def pull_to_anchors(self, mu: float) -> None:
        self.gradients.begin(mu=mu, anchors=self._anchors)

    def add_offsets(self, offsets: Arrays | None) -> None:
        _, shared = ranks.share_arrays(offsets)
        tensors = {name: as_tensor(array) for name, array in shared}
        self._meter = StepMeter(gradients=not all(is_plain_sgd(optimizer) for optimizer in self._optimizers))
        self.gradients.begin(offsets=tensors, meter=self._meter)

    def leave_gradients(self) -> None:
        self.gradients.end()

    def step_record(self) -> StepRecord:
        meter = self._meter
        assert meter is not None
        return StepRecord(mean_gradients=meter.means()) if meter.gradients else StepRecord(rates=meter.rates())

    def standby_model(self) -> TorchStandbyModel:
        return TorchStandbyModel(self._module, self._optimizers, self._beside)

    def close(self) -> None:
        self.gradients.close()
