"""Exact restarts of `fit`: its epoch and variables, and rounds whose data and random states can be begun anew."""

from __future__ import annotations

from typing import Any

import keras

from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

from .fit_call import FitCall
from .live import LiveModel
from .names import named_variables
from .optimizer import build, scope
from .run import Run
from .state import assign, to_host

_ARRAYS, _LOADER = "ArrayDataAdapter", "TorchDataLoaderAdapter"
_STATEFUL = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.EarlyStopping, keras.callbacks.BackupAndRestore)


class FitSnapshot:
    """All that outlives a round of one `fit` and does not travel, as a `Snapshot`.

    run: set once it is made. epochs: behind us when the training begins, and after `load` those of the process before.
    The variables must hold their values.
    """

    def __init__(self, model: Any, live: LiveModel, epochs: int) -> None:
        self._model, self._live = model, live
        self.run: Run | None = None
        self.epochs = epochs
        for optimizer in _optimizers(model):
            build(model, optimizer)
            if not optimizer.built:  # one that scales losses, around it
                with scope(model):
                    optimizer.build(model.trainable_variables)

    def save(self) -> State:
        with self._live.corrections.hidden():
            return {
                "epochs": self.epochs if self.run is None or not self.run.round else self.run.epoch + 1,
                "weights": {name: to_host(variable) for name, variable in self._weights().items()},
                "seeds": [to_host(variable) for variable in self._seeds()],
                "optimizers": [[to_host(v) for v in optimizer.variables] for optimizer in _optimizers(self._model)],
                "local": self._live.local.state_dict(),
            }

    def load(self, state: State) -> None:
        self.epochs = state["epochs"]
        found, kept = self._weights(), state["weights"]
        _set(list(found.values()), [kept[name] for name in found] if found.keys() == kept.keys() else [])
        _set(self._seeds(), state["seeds"])
        for optimizer, values in zip(_optimizers(self._model), state["optimizers"], strict=True):
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
    """Raise ConfigError, before round 1, for what cannot be restarted exactly, with the reason."""
    if every.epochs is None:
        raise _refused(
            "Keras begins an epoch's data at its beginning only, and with a budget in steps rounds end within epochs",
            'count the round in epochs: every="epoch"',
        )
    if fit.iterator.steps_per_epoch:
        raise _refused("with steps_per_epoch an epoch goes on with the data of the one before", "leave it out")
    for other in fit.callbacks.callbacks:
        if isinstance(other, _STATEFUL):
            name = type(other).__name__
            raise _refused(
                f"{name} has a state of its own between epochs, which Keras does not give out",
                "fit is brought back without it: leave it out"
                if name == "BackupAndRestore"
                else "leave it out; a LearningRateScheduler works, and patience in the job",
            )
    data = fit.iterator.data_adapter
    kind = type(data).__name__
    if kind == _LOADER and keras.backend.backend() == "torch":
        if getattr(data._dataloader, "persistent_workers", False):
            raise _refused("the random states of data loader workers that live on are out of reach", "end them")
    elif kind != _ARRAYS:
        raise _refused(
            f"the order of this data ({kind.removesuffix('Adapter')}) cannot be begun anew",
            "pass arrays, or under PyTorch a DataLoader",
        )


def begin_round(fit: FitCall, seed: int) -> None:
    """Seed what the round draws from, in `on_epoch_begin`; its data begin after that."""
    keras.utils.set_random_seed(seed % 2**32)
    data = fit.iterator.data_adapter
    if type(data).__name__ == _LOADER:
        from fl_adapters.torch.restart import seed_round

        seed_round(seed, data._dataloader)
    elif keras.backend.backend() == "tensorflow" and data._shuffle:
        # a shuffle takes its seed when it is made, and counts its calls from there
        iterator = fit.iterator
        made = iterator._distribute_strategy.experimental_distribute_dataset(data.get_tf_dataset())
        iterator._distributed_dataset, iterator._current_iterator = made, None


def _optimizers(model: Any) -> list[Any]:
    """The model's optimizers, those included that a custom `train_step` keeps in attributes; loss scaling with them."""
    kept = [v for v in vars(model).values() if isinstance(v, keras.optimizers.Optimizer)]
    return list({id(o): o for o in (model.optimizer, *kept) if o is not None}.values())


def _set(variables: list[Any], values: list[Array]) -> None:
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise ConfigError(
            "what this site kept before its restart is of another model or optimizer",
            where=f"{len(values)} variables kept, {len(variables)} here",
            fix="start the site again with the same script",
        )
    for variable, value in zip(variables, values, strict=True):
        assign(variable, value)


def _refused(reason: str, fix: str) -> ConfigError:
    return ConfigError(f"exact_restart cannot be kept here: {reason}", where="fit", fix=fix)
