"""The other callbacks of the same `fit`: their place in the order, their folders, and what cannot be federated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from fl_adapters.participant.options import SiteSettings
from fl_runtime.errors import ConfigError

_PATHS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.BackupAndRestore: "backup_dir",
    keras.callbacks.CSVLogger: "filename",
    keras.callbacks.TensorBoard: "log_dir",
}


def refuse_twice(callback: keras.callbacks.Callback, callbacks: Any) -> None:
    """Raise ConfigError where `fit` got more than one callback of this kind."""
    count = sum(isinstance(other, type(callback)) for other in callbacks.callbacks)
    if count > 1:
        raise ConfigError(
            f"fit got {count} callbacks of the type {type(callback).__name__}: each would exchange the weights",
            where="fit(callbacks=...)",
            fix="give it one",
        )


def put_first(callback: keras.callbacks.Callback, callbacks: Any) -> None:
    """Make `callback` the first of all, so that whatever the others save or watch is what the exchange has left."""
    others = [other for other in callbacks.callbacks if other is not callback]
    callbacks.callbacks = [callback, *others]  # a new list: Keras may be walking through the old one


def move_outputs(callbacks: Any, moved: Callable[[str], str]) -> None:
    """Send what the other callbacks write to where this site's output belongs."""
    for other in callbacks.callbacks:
        attribute = next((name for kind, name in _PATHS.items() if isinstance(other, kind)), None)
        old = str(getattr(other, attribute)) if attribute else ""
        new = moved(old) if old else ""
        if new == old:
            continue
        for name, value in list(vars(other).items()):  # paths below it that were made of it
            if isinstance(value, str) and value.startswith(old):
                setattr(other, name, new + value.removeprefix(old))
        if isinstance(other, keras.callbacks.TensorBoard):
            other.set_model(callbacks.model)  # it may have opened its files already


def refuse_unsupported(callbacks: Any, settings: SiteSettings, *, evaluates: bool) -> None:
    """Raise ConfigError for callbacks that cannot work in a federation, with the reason."""
    for other in callbacks.callbacks:
        if isinstance(other, keras.callbacks.SwapEMAWeights):
            raise ConfigError(
                "SwapEMAWeights evaluates and saves this site's moving average in place of the global model",
                where="fit(callbacks=...)",
                fix="leave it out; the server's average over sites has a similar effect",
            )
    for stopping in restoring(callbacks):
        _refuse_other_best(stopping, settings, evaluates=evaluates)


def refuse_saving_within_epochs(callbacks: Any) -> None:
    """Raise ConfigError where a file of a batch's end would hold the variables that correct the gradients."""
    kinds = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
    for other in callbacks.callbacks:
        if isinstance(other, kinds) and isinstance(other.save_freq, int):
            raise ConfigError(
                "with this strategy the optimizer has further variables within an epoch, which must not be saved",
                where=f"{type(other).__name__}(save_freq={other.save_freq})",
                fix="save at the end of epochs: save_freq='epoch'",
            )


def restoring(callbacks: Any) -> list[Any]:
    """The callbacks that load the best weights at the end."""
    kind = keras.callbacks.EarlyStopping
    return [other for other in callbacks.callbacks if isinstance(other, kind) and other.restore_best_weights]


def _refuse_other_best(stopping: Any, settings: SiteSettings, *, evaluates: bool) -> None:
    """Best weights at the end are those of the best global round: both must mean the same by best."""
    where = f"EarlyStopping(monitor={stopping.monitor!r}, restore_best_weights=True)"
    if not evaluates:
        raise ConfigError(
            "restore_best_weights means the best global round, which nobody scores without evaluate_global",
            where=where,
            fix="pass validation_data= to fit and leave evaluate_global on, or set restore_best_weights=False",
        )
    metric, mode = stopping.monitor.removeprefix("val_"), stopping.mode
    mode = "min" if (metric, mode) == ("loss", "auto") else mode
    if (
        not stopping.monitor.startswith("val_")
        or metric != settings.best_metric
        or mode not in ("auto", settings.best_mode)
    ):
        raise ConfigError(
            f"restore_best_weights asks for the {mode} of {stopping.monitor!r}, while the job picks the best round by "
            f"the {settings.best_mode} of the validation {settings.best_metric!r}",
            where=where,
            fix=f"set best_metric: {metric} and best_mode in the job, or monitor='val_{settings.best_metric}'",
        )
