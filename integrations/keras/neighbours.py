"""The other callbacks of the same `fit`: their order, their output folders, and those that cannot be federated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import keras

from fl_adapters.participant.options import BestMetric, SiteSettings
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays

from .state import KerasState

_PATHS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.BackupAndRestore: "backup_dir",
    keras.callbacks.CSVLogger: "filename",
    keras.callbacks.TensorBoard: "log_dir",
}
_HIGHER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1_score")


def refuse_twice(callback: keras.callbacks.Callback, callbacks: Any) -> None:
    """Raise ConfigError if `fit` got more than one callback of this kind."""
    count = sum(isinstance(other, type(callback)) for other in callbacks.callbacks)
    if count > 1:
        raise ConfigError(
            f"fit got {count} callbacks of the type {type(callback).__name__}: each would exchange the weights",
            where="fit(callbacks=...)",
            fix=f"pass one {type(callback).__name__}",
        )


class ResultKeeper(keras.callbacks.Callback):
    """Puts the result of a run into the model once more, after all other callbacks have seen the end of fit."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[KerasState, Arrays] | None = None

    def keep(self, state: KerasState) -> None:
        """Take what the model holds now as the result of the run."""
        self._kept = state, state.get_state()

    def on_train_end(self, logs: Any = None) -> None:
        """Put the result back if other callbacks have changed the model since, and say so."""
        if self._kept is None:
            return
        state, arrays = self._kept
        self._kept = None
        _ = self.model  # under JAX, this sets the variables to what other callbacks have made of them
        if state.set_result(arrays):
            print(
                "fl-adapters: a callback changed the weights after the last exchange; they are the global ones again",
                file=sys.stderr,
                flush=True,
            )


def put_around(callback: keras.callbacks.Callback, callbacks: Any) -> None:
    """Put `callback` before all others, so that they save and watch the model after the exchange.

    A `ResultKeeper` comes last.
    """
    others = [other for other in callbacks.callbacks if other is not callback and not isinstance(other, ResultKeeper)]
    keeper = ResultKeeper()
    keeper.set_model(callbacks.model)
    callbacks.callbacks = [callback, *others, keeper]  # a new list, since Keras may be iterating over the old one


def keep_result(callbacks: Any, state: KerasState) -> None:
    """Let the model end with the variables that it holds now, whatever other callbacks do."""
    for other in callbacks.callbacks:
        if isinstance(other, ResultKeeper):
            other.keep(state)


def move_outputs(callbacks: Any, new_path: Callable[[str], str]) -> None:
    """Move the output of the other callbacks to this site's folder.

    Args:
        callbacks: Keras's list of all callbacks.
        new_path: Returns the path to use in place of a path; the same path if it may stay.
    """
    for other in callbacks.callbacks:
        attribute = next((name for kind, name in _PATHS.items() if isinstance(other, kind)), None)
        old = str(getattr(other, attribute)) if attribute else ""
        new = new_path(old) if old else ""
        if new == old:
            continue
        for name, value in list(vars(other).items()):  # paths below it that the callback has derived
            if isinstance(value, str) and value.startswith(old):
                setattr(other, name, new + value.removeprefix(old))
        if isinstance(other, keras.callbacks.TensorBoard):
            other.set_model(callbacks.model)  # it may have opened its files already


def refuse_unsupported(callbacks: Any, settings: SiteSettings, *, evaluates: bool) -> None:
    """Refuse callbacks that cannot work in a federation.

    Args:
        callbacks: Keras's list of all callbacks.
        settings: What holds at this site.
        evaluates: Whether this site scores global models.

    Raises:
        ConfigError: With the reason.
    """
    for other in callbacks.callbacks:
        if isinstance(other, keras.callbacks.SwapEMAWeights):
            raise ConfigError(
                "SwapEMAWeights evaluates and saves this site's moving average in place of the global model",
                where="fit(callbacks=...)",
                fix="leave it out; the server's average over sites has a similar effect",
            )
    best = settings.best(best_metric(callbacks))
    for stopping in restoring_callbacks(callbacks):
        _refuse_other_best(stopping, best, evaluates=evaluates)


def best_metric(callbacks: Any) -> BestMetric | None:
    """The validation metric that the other callbacks pick the best epoch by; None if that cannot be known.

    A callback that restores the best weights comes first, then one that saves the best model, then early stopping.
    """
    savers = [c for c in callbacks.callbacks if isinstance(c, keras.callbacks.ModelCheckpoint) and c.save_best_only]
    stoppers = [c for c in callbacks.callbacks if isinstance(c, keras.callbacks.EarlyStopping)]
    for watching in (*restoring_callbacks(callbacks), *savers, *stoppers):
        mode = _mode(watching)
        if watching.monitor.startswith("val_") and mode is not None:
            return BestMetric(watching.monitor.removeprefix("val_"), mode)
    return None


def _mode(watching: Any) -> Literal["min", "max"] | None:
    """Which values a callback takes for better; None if its mode is "auto" and the metric's name does not tell."""
    if watching.mode in ("min", "max"):
        return "min" if watching.mode == "min" else "max"
    name = watching.monitor
    if name.endswith(("loss", "error")):
        return "min"
    return "max" if any(part in name for part in _HIGHER_IS_BETTER) else None


def refuse_saving_within_epochs(callbacks: Any) -> None:
    """Raise ConfigError if a callback would save the model within an epoch, with the variables of the correction."""
    kinds = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
    for other in callbacks.callbacks:
        if isinstance(other, kinds) and isinstance(other.save_freq, int):
            raise ConfigError(
                "with this strategy the optimizer has further variables within an epoch, which must not be saved",
                where=f"{type(other).__name__}(save_freq={other.save_freq})",
                fix="save at the end of epochs: save_freq='epoch'",
            )


def restoring_callbacks(callbacks: Any) -> list[Any]:
    """The callbacks that restore the best weights at the end."""
    kind = keras.callbacks.EarlyStopping
    return [other for other in callbacks.callbacks if isinstance(other, kind) and other.restore_best_weights]


def _refuse_other_best(stopping: Any, best: BestMetric, *, evaluates: bool) -> None:
    """Refuse a callback whose best model is another one than the job's best round."""
    where = f"EarlyStopping(monitor={stopping.monitor!r}, restore_best_weights=True)"
    if not evaluates:
        raise ConfigError(
            "restore_best_weights restores the best global round, but global models are not scored here",
            where=where,
            fix="pass validation_data= to fit and leave evaluate_global on, or set restore_best_weights=False",
        )
    metric, mode = stopping.monitor.removeprefix("val_"), _mode(stopping) or "auto"
    if not stopping.monitor.startswith("val_") or metric != best.name or mode not in ("auto", best.mode):
        raise ConfigError(
            f"restore_best_weights asks for the {mode} of {stopping.monitor!r}, while the job picks the best round by "
            f"the {best.mode} of the validation {best.name!r}",
            where=where,
            fix=f"set best_metric: {metric} and best_mode in the job, or mode= and monitor='val_{best.name}' here",
        )
