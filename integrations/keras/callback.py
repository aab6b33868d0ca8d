"""`FederatedCallback` for Keras: the hooks of `model.fit`, translated into the calls of a `FitRun`."""

from __future__ import annotations

from typing import Any

import keras

from fl_adapters.participant.options import SharedArguments
from fl_runtime.errors import ConfigError

from .fit_run import FitRun
from .trainer import FitCall, calling_fit, raw_model, state_without_model


class FederatedCallback(SharedArguments, keras.callbacks.Callback):
    """Makes `model.fit` a site of a federation.

    One `fit` spans all rounds and stops after the last one. Pass it enough epochs, since Keras cannot lengthen it; if
    there are too few, an error before the first step names the number. Afterwards the model holds the final global
    weights, or those of the best round with `EarlyStopping(restore_best_weights=True)`. A round that ends with an
    epoch is exchanged before fit validates and before any other callback sees the epoch's end, so validation metrics
    and saved files describe the global model. The logs of each epoch get `federation_round`, `federation_bytes_up`,
    `federation_bytes_down` and `federation_seconds`.

    Outside a federation, that is without a startup kit, it prints one line and stays out of the way. The callback
    holds no connection, lock or thread: the session belongs to the process. It may be pickled and copied between
    calls of `fit`. It works on TensorFlow, PyTorch and JAX.

    Args:
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Local budget between two exchanges: "epoch", "2 epochs", or a number of optimizer steps. Default: the
            job's, else "epoch".
        exchange: What travels: "auto" (trainable variables, and what trained layers keep beside them, such as the
            moving averages of a batch normalization), "trainable", "all", or a list of name patterns such as
            `["encoder/*"]`. Default: the job's, else "auto".
        keep_local: Name patterns of variables that never leave this site, such as `["head/*"]`. They are added to the
            job's own.
        optimizer_state: What becomes of the optimizer when new global weights arrive: "keep"; "reset" its moments and
            its step counter (not together with a `LearningRateSchedule`); or "average" them over the sites. Default:
            the job's, else "keep".
        evaluate_global: Whether each global model is scored on fit's validation data, so that the server can pick the
            best round. Default: yes if fit has validation data.
        num_examples: Weight of this site in the average, above 0. Default: the size of the training set, or the
            examples seen in the round if the data has no length.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (class names, vocabularies) must be equal at all sites. A
            dict adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Raises:
        ConfigError: For an argument that cannot work. The hooks raise it too, before the first step, for features of
            `fit` that cannot be federated.

    Example:
        ```python
        model.fit(x, y, epochs=20, validation_split=0.1, callbacks=[FederatedCallback()])
        model.save("final.keras")
        ```
    """

    _fit: FitCall | None = None
    _run: FitRun | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything of a running fit behind: a copy does not take part in it."""
        return {**state_without_model(self), "_fit": None, "_run": None}

    def set_model(self, model: Any) -> None:
        """Join the federation. Keras calls this before all other hooks of a fit."""
        super().set_model(model)
        self._join()

    def on_train_begin(self, logs: Any = None) -> None:
        """Join if the list of callbacks was made before fit, and prepare an exact restart."""
        self._join()
        if self._fit is None and self.options.required:
            raise ConfigError(
                "FederatedCallback works within model.fit only",
                where="on_train_begin",
                fix="for a loop of your own use fl_adapters.connect()",
            )
        if self._run is not None:
            self._run.prepare_exact_restart()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take the first global model before the first epoch, and prepare the epoch."""
        if self._run is not None:
            self._run.begin_epoch(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """End a round between two batches. With `on_train_batch_end`, Keras would wait for the result of each step."""
        if self._run is not None:
            self._run.begin_batch(batch)

    def on_test_begin(self, logs: Any = None) -> None:
        """End a round before fit validates, so that it validates the global model."""
        if self._run is not None:
            self._run.end_training()

    def on_test_end(self, logs: Any = None) -> None:
        """Report the validation of a global model."""
        if self._run is not None:
            self._run.report(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """End a round if fit has not validated, and add the exchange to the epoch's logs."""
        if self._run is not None:
            self._run.end_training()
            row = self._run.end_epoch(epoch)
            if logs is not None:
                logs.update(row)

    def on_train_end(self, logs: Any = None) -> None:
        """Finish the run, or leave it if fit stopped before the last round."""
        if self._run is not None:
            self._run.end()
            self._fit = self._run = None

    def _join(self) -> None:
        fit = calling_fit(raw_model(self))
        if fit is None or fit.is_same(self._fit):
            return
        if self._run is not None:
            self._run.close()
        self._run, self._fit = None, fit
        self._run = FitRun.join(self, self.options, fit)
