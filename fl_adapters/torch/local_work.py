"""What the job's strategy asks of local training, carried out on a live torch model: corrected gradients, and a
personal model in a second phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fl_adapters.participant.control_variate import ControlVariate, put_control
from fl_adapters.participant.local_phases import SiteHome
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.state_file import State
from fl_adapters.torch import ranks
from fl_adapters.torch.correction import GradientCorrection, StepMeter, is_plain_sgd
from fl_adapters.torch.personal import PersonalModel
from fl_adapters.torch.state import TorchState, as_tensor, numpy_dtype
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task


class LocalWork:
    """One training run's part in the strategy, on every rank. Does nothing until a task asks for something.

    Methods are collective unless they say otherwise. `gradients` is what the adapter's hooks call.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Any], state: TorchState, phases: int) -> None:
        self._module, self._optimizers, self._phases = module, optimizers, phases
        self._parameters = {
            name: tensor
            for name, tensor in state.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }
        self.gradients = GradientCorrection(self._parameters)
        self.personal: PersonalModel | None = None
        self._terms = LocalTerms()
        self._control: ControlVariate | None = None
        self._anchors: dict[str, Tensor] = {}
        self._meter: StepMeter | None = None
        self._whole = True
        self._global: LocalResult | None = None
        self._came: State | None = None  # the personal model of a process before this one
        self.home = SiteHome(Path(), 1, fresh=True)  # set by rank 0, for itself

    def begin(self, task: Task | None, *, whole: bool) -> None:
        """A round begins with rank 0's `task`. whole: its weights are in the model; else this process goes on in the
        middle of the round. Raises ConfigError where it cannot."""
        config, number = ranks.share([dict(task.config), task.round] if task else None)
        terms = self._terms = LocalTerms.from_config(config)
        self._global, self._whole, self._meter = None, whole, None
        if (self._phases == 2) != (terms.personal_mu is not None):
            raise ConfigError(
                "the server's strategy and the job's name for it do not say the same of a personal model",
                where=f"task of round {number}",
                fix="install the same version of fl-adapters at the server and at all sites",
            )
        if terms.proximal_mu or terms.personal_mu is not None:
            self._anchors = self._arrived(task, whole=whole)
        if terms.personal_mu is not None:
            self._prepare_personal(number, whole=whole)
        self._correct(task)

    def phase_ended(self, phase: LocalResult, *, more: bool) -> LocalResult | None:
        """The trainer has used up the budget once. None: it does so once more, for the personal model, which is in the
        module now; else what to send with the weights that are in the module. more: whether the trainer goes on."""
        self._check_seen(phase)
        personal, mu = self.personal, self._terms.personal_mu
        if personal is None or mu is None or (not personal.active and not more):
            return phase
        if not personal.active:
            self._global = phase
            personal.swap()
            self.gradients.begin(mu=mu, anchors=self._anchors)
            return None
        personal.swap()
        self.gradients.end()
        if ranks.is_rank_zero():
            personal.save(self.home.folder)
        assert self._global is not None
        return self._global.with_personal(phase.metrics)

    def extras(self, weights: Arrays) -> Arrays:
        """What travels beside the `weights` of this round's update. On rank 0; no collective."""
        control, meter = self._control, self._meter
        if control is None or not self._terms.control_variates:
            return {}
        if meter is None or not self._whole:
            return control.end_without()
        if meter.gradients:
            return control.end_by_gradients(meter.means())
        return control.end_by_rates(weights, meter.rates())

    def submitted(self, status: str) -> None:
        """What the update counted as. On rank 0; no collective."""
        if self._control is not None:
            self._control.submitted(status)

    def kept(self) -> State:
        """What this training would have after a round whose update has been counted, for exact restarts."""
        control = None if self._control is None else self._control.kept()
        return {"control": control, "personal": None if self.personal is None else self.personal.kept()}

    def go_on(self, state: State) -> None:
        """From what `kept` gave to another process of this site; before `begin`."""
        put_control(self.home, state["control"])
        self._came = state["personal"]

    def close(self) -> None:
        """Training is over, or goes on without the federation. Any rank by itself."""
        self.gradients.close()

    def _correct(self, task: Task | None) -> None:
        terms = self._terms
        if terms.control_variates:
            self._meter = StepMeter(gradients=not all(is_plain_sgd(optimizer) for optimizer in self._optimizers))
            self.gradients.begin(offsets=self._offsets(task), meter=self._meter)
        elif terms.proximal_mu:
            self.gradients.begin(mu=terms.proximal_mu, anchors=self._anchors)
        else:
            self.gradients.end()

    def _arrived(self, task: Task | None, *, whole: bool) -> dict[str, Tensor]:
        """The global weights of the round, by parameter name."""
        if whole:
            return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        _, shared = ranks.share_arrays({n: task.arrays[n] for n in self._parameters} if task else None)
        return {name: as_tensor(array).clone() for name, array in shared}

    def _offsets(self, task: Task | None) -> Mapping[str, Tensor]:
        """c - c_i, from rank 0."""
        offsets = None
        if task is not None:
            if self._control is None:
                dtypes = {name: numpy_dtype(parameter.dtype) for name, parameter in self._parameters.items()}
                self._control = ControlVariate(self.home, dtypes)
            offsets = self._control.begin(task.arrays, task.extras)
        _, shared = ranks.share_arrays(offsets)
        return {name: as_tensor(array) for name, array in shared}

    def _prepare_personal(self, number: int, *, whole: bool) -> None:
        if not whole:
            raise ConfigError(
                "a round with a personal model cannot be resumed in its middle",
                where=f"checkpoint within round {number}",
                fix="resume from a checkpoint of a round's end, or without one: the personal model is kept by itself",
            )
        if self.personal is None:
            self.personal = PersonalModel(self._module, self._optimizers)
            if self._came is not None:
                self.personal.go_on(self._came)
                return
            kept = str(self.home.folder) if ranks.is_rank_zero() and not self.home.fresh else None
            if (folder := ranks.share(kept)) is not None:
                self.personal.load(Path(folder))

    def _check_seen(self, phase: LocalResult) -> None:
        asked = self._terms.corrects or (self.personal is not None and self.personal.active)
        if asked and phase.local_steps and not self.gradients.steps:
            raise ConfigError(
                "no gradient of this round has passed through the optimizer, so none could be corrected",
                where="optimizer",
                fix="use an optimizer whose step() takes all gradients (not one that works layer by layer), or a "
                "strategy that leaves gradients alone, such as fedavg",
            )
