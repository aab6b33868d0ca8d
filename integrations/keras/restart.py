"""Exact restarts of `fit`: what to save of its state, and how a round's data and random states are repeated."""

from __future__ import annotations

from typing import Any

import keras

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import not_restartable, require_whole_epochs
from fl_adapters.participant.state_file import State
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

from .live import LiveModel
from .names import named_variables
from .optimizer import all_optimizers, build
from .preprocessing import deriving_again
from .progress import Progress
from .state import assign, to_host
from .trainer import FitCall

_ARRAYS, _LOADER = "ArrayDataAdapter", "TorchDataLoaderAdapter"
_STATEFUL = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.EarlyStopping, keras.callbacks.BackupAndRestore)


class FitSnapshot:
    """A `Snapshot` of one `fit`: everything that outlives a round and does not travel.

    The variables must hold their values.

    Attributes:
        epochs: Epochs behind the site when training begins; after `load`, those of the process before.
    """

    def __init__(self, model: Any, live: LiveModel, progress: Progress, epochs: int) -> None:
        """Build the optimizers, so that there is a place for every value of a snapshot.

        Args:
            model: The model.
            live: The same model as the federation sees it.
            progress: Where fit stands; kept up to date by its owner.
            epochs: Epochs behind the site when training begins.
        """
        self._model, self._live, self._progress = model, live, progress
        self.epochs = epochs
        for optimizer in all_optimizers(model):
            build(model, optimizer)

    def save(self) -> State:
        with self._live.corrections.hidden():
            return {
                "epochs": self._progress.epoch + 1 if self._progress.round else self.epochs,
                "weights": {name: to_host(variable) for name, variable in self._weights().items()},
                "seeds": [to_host(variable) for variable in self._seeds()],
                "optimizers": [[to_host(v) for v in o.variables] for o in all_optimizers(self._model)],
                "local": self._live.local.state_dict(),
            }

    def load(self, state: State) -> None:
        self.epochs = state["epochs"]
        weights, saved = self._weights(), state["weights"]
        with deriving_again(self._model):
            _set(list(weights.values()), [saved[name] for name in weights] if weights.keys() == saved.keys() else [])
        _set(self._seeds(), state["seeds"])
        for optimizer, values in zip(all_optimizers(self._model), state["optimizers"], strict=True):
            _set(optimizer.variables, values)
        self._live.local.load_state_dict(state["local"])

    def _weights(self) -> dict[str, Any]:
        """What training may change and that does not travel."""
        named = named_variables(self._model)
        travels = self._live.state.variables
        return {name: v.variable for name, v in named.items() if v.role != "frozen" and name not in travels}

    def _seeds(self) -> list[Any]:
        """The states of the layers' random generators."""
        weights = {id(variable) for variable in self._model.weights}
        return [variable for variable in self._model.variables if id(variable) not in weights]


def refuse(fit: FitCall, every: Every) -> None:
    """Refuse, before round 1, what cannot be restarted exactly.

    Raises:
        ConfigError: With the reason.
    """
    require_whole_epochs(every, "Keras", where="fit")
    if fit.continues_data:
        raise _refused("with steps_per_epoch an epoch continues with the data of the one before", "leave it out")
    for other in fit.callbacks.callbacks:
        if isinstance(other, _STATEFUL):
            name = type(other).__name__
            raise _refused(
                f"{name} has a state of its own between epochs, which Keras does not make accessible",
                "leave it out: fit is restored without it"
                if name == "BackupAndRestore"
                else "leave it out; a LearningRateScheduler works, and patience in the job",
            )
    if fit.data_kind == _LOADER and keras.backend.backend() == "torch":
        if getattr(fit.torch_loader, "persistent_workers", False):
            raise _refused(
                "the random states of persistent data loader workers cannot be set", "set persistent_workers=False"
            )
    elif fit.data_kind != _ARRAYS:
        raise _refused(
            f"the order of this data ({fit.data_kind.removesuffix('Adapter')}) cannot be repeated",
            "pass arrays, or under PyTorch a DataLoader",
        )


def begin_round(fit: FitCall, seed: int) -> None:
    """Seed everything random in a round, in `on_epoch_begin`; its data starts after that."""
    keras.utils.set_random_seed(seed % 2**32)
    if fit.data_kind == _LOADER:
        from fl_adapters.torch.restart import seed_round

        seed_round(seed, fit.torch_loader)
    else:
        fit.restart_shuffle()


def _set(variables: list[Any], values: list[Array]) -> None:
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise ConfigError(
            "what this site saved before its restart belongs to another model or optimizer",
            where=f"{len(values)} variables saved, {len(variables)} here",
            fix="start the site again with the same script",
        )
    for variable, value in zip(variables, values, strict=True):
        assign(variable, value)


def _refused(reason: str, fix: str) -> ConfigError:
    return not_restartable(reason, fix, where="fit")
