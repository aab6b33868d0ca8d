"""All access to what Keras keeps private: the call of `fit`, its data, layers, optimizers and the compiled step.

No other file of this package uses a private attribute of Keras. Each access was checked in Keras 3.10.0 and 3.15.1, the
oldest and the newest release that are tested, unless its comment names another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import keras

from fl_runtime.errors import ConfigError
from fl_runtime.wire.names import ordered

_STEP = "_backend_update_step"
_VARIABLES = "_variables"
_KEEPING_BATCHES = (
    *("_PrefetchDataset", "_OptionsDataset", "_CacheDataset", "_ShuffleDataset", "_ModelDataset"),
    *("_MapDataset", "_ParallelMapDataset", "_AssertCardinalityDataset"),
)
"""Operations of tf.data that change neither the number of batches nor, but for a map of the user's, their rows."""


@dataclass(frozen=True)
class FitCall:
    """One running call of `fit`. It holds live objects of the call, so keep it no longer than the call.

    Attributes:
        epochs: The epoch before which `fit` stops.
        iterator: Keras's iterator over the training data.
        callbacks: Keras's list of all callbacks.
        validation: Arguments of `model.evaluate` for fit's own validation data; None without validation data.
        first: The epoch with which the caller lets `fit` begin.
    """

    epochs: int
    iterator: Any
    callbacks: Any
    validation: Mapping[str, Any] | None
    first: int = 0

    @property
    def steps(self) -> int | None:
        """Batches in an epoch; None if the data has no length, at least until the first epoch is over."""
        steps = self.iterator.num_batches  # EpochIterator is not exported: Keras 3.10.0 and 3.15.1
        return None if steps is None else int(steps)

    @property
    def num_examples(self) -> int | None:
        """Size of the training set; None if the data does not tell it."""
        data = self._data
        batches, size = data.num_batches, data.batch_size
        if batches and not size and self.data_kind == "TFDatasetAdapter":
            return _rows(data._dataset)  # Keras 3.10.0 and 3.15.1
        if not batches or not size:
            return None
        partial = data.partial_batch_size
        return int((batches - 1) * size + partial if partial else batches * size)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the training data, in their order; empty if it does not tell them.

        `image_dataset_from_directory` tells them, also below the `map` or `prefetch` of a script.
        """
        data, loader = self._data, self.torch_loader
        # TFDatasetAdapter._dataset, PyDatasetAdapter.py_dataset: Keras 3.10.0 and 3.15.1
        source = getattr(data, "_dataset", None) if loader is None else loader.dataset
        source = getattr(data, "py_dataset", None) if source is None else source
        while source is not None:
            for name in ("class_names", "class_indices", "class_to_idx", "classes"):
                if entries := ordered(getattr(source, name, None)):
                    return entries
            source = getattr(source, "_input_dataset", None)  # TensorFlow 2.18.0 and 2.21.0
        return []

    @property
    def continues_data(self) -> bool:
        """Whether an epoch continues with the data of the one before, as `steps_per_epoch` makes it."""
        return bool(self.iterator.steps_per_epoch)  # EpochIterator is not exported: Keras 3.10.0 and 3.15.1

    @property
    def data_kind(self) -> str:
        """Name of Keras's class for the training data, such as "ArrayDataAdapter"."""
        return type(self._data).__name__

    @property
    def torch_loader(self) -> Any:
        """The PyTorch DataLoader with the training data; None for other data."""
        # TorchDataLoaderAdapter keeps the loader here: Keras 3.10.0 and 3.15.1
        return getattr(self._data, "_dataloader", None)

    def restart_shuffle(self) -> None:
        """Let TensorFlow shuffle arrays by the global seed as it is now. Nothing to do on other backends.

        A shuffle of tf.data takes its seed when it is made and counts its calls from there, so it is made anew.
        """
        data, iterator = self._data, self.iterator
        # ArrayDataAdapter._shuffle, TFEpochIterator._distribute_strategy, ._distributed_dataset and
        # EpochIterator._current_iterator: Keras 3.10.0 and 3.15.1
        if keras.backend.backend() == "tensorflow" and data._shuffle:
            dataset = iterator._distribute_strategy.experimental_distribute_dataset(data.get_tf_dataset())
            iterator._distributed_dataset, iterator._current_iterator = dataset, None

    def is_same(self, other: FitCall | None) -> bool:
        """Whether `other` is the same call."""
        return other is not None and other.iterator is self.iterator

    @property
    def _data(self) -> Any:
        return self.iterator.data_adapter  # EpochIterator is not exported: Keras 3.10.0 and 3.15.1


def _rows(dataset: Any) -> int | None:
    """Number of rows that a `tf.data.Dataset` puts into batches; None if its last operations do not tell.

    A batch of a dataset whose last one may be smaller has no static size, so the operation that makes the batches is
    looked up.
    """
    while type(dataset).__name__ in _KEEPING_BATCHES:  # names and `_input_dataset`: TensorFlow 2.18.0 and 2.21.0
        dataset = dataset._input_dataset
    if type(dataset).__name__ not in ("_BatchDataset", "_ParallelBatchDataset"):
        return None
    rows = int(dataset._input_dataset.cardinality())
    return rows if rows > 0 else None


def calling_fit(model: Any) -> FitCall | None:
    """Find the `fit` of `model` whose hook is running.

    Keras tells a callback neither its data nor the other callbacks, but both are on the call stack.

    Returns:
        The call, or None within `evaluate`, `predict` or a custom loop.
    """
    callbacks: Any = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        if callbacks is None and isinstance(local.get("self"), keras.callbacks.CallbackList):
            callbacks = local["self"]
        # `fit` of every backend names its iterator so: Keras 3.10.0 and 3.15.1
        if local.get("self") is model and "epoch_iterator" in local:
            return _call(local, callbacks) if frame.f_code.co_name == "fit" and callbacks is not None else None
        frame = frame.f_back
    return None


def _call(local: Mapping[str, Any], callbacks: Any) -> FitCall:
    validation = None
    if local.get("validation_data") is not None:
        # Local variables of `fit`, on every backend: Keras 3.10.0 and 3.15.1
        validation = {
            "x": local["val_x"],
            "y": local["val_y"],
            "sample_weight": local["val_sample_weight"],
            "batch_size": local["validation_batch_size"] or local["batch_size"],
            "steps": local["validation_steps"],
        }
    return FitCall(int(local["epochs"]), local["epoch_iterator"], callbacks, validation, int(local["initial_epoch"]))


def raw_model(callback: keras.callbacks.Callback) -> Any:
    """The model that `fit` trains.

    `callback.model` is the same model after its variables have been brought up to date (JAX), or the module within a
    `DistributedDataParallel` (PyTorch). `stop_training` must be set here.
    """
    return callback._model  # Keras 3.10.0 and 3.15.1


def state_without_model(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """The attributes of a callback for a copy of it, without the model that it is attached to."""
    return {**callback.__dict__, "_model": None}  # Callback._model: Keras 3.10.0 and 3.15.1


def restored_epoch(model: Any) -> int | None:
    """The epoch with which `fit` begins because a callback restored it; None for the one that the caller passed."""
    return getattr(model, "_initial_epoch", None)  # set by BackupAndRestore: Keras 3.10.0 and 3.15.1


def set_restored_epoch(model: Any, epoch: int | None) -> None:
    """Let `fit` begin with another epoch than its caller passed. Takes effect in `on_train_begin`, until unset."""
    model._initial_epoch = epoch  # read after on_train_begin: Keras 3.10.0 and 3.15.1


def ensure_built(model: Any, fit: FitCall) -> None:
    """Build a model that TensorFlow would otherwise build within its first step.

    A model without `call`, whose own `train_step` calls its layers, is complete once these are built.

    Raises:
        ConfigError: If the model cannot be built from the first batch.
    """
    # Model._flatten_layers and Trainer._symbolic_build: Keras 3.10.0 and 3.15.1
    if all(layer.built or not _has_call(layer) for layer in model._flatten_layers()):
        return
    where = f"{type(model).__name__} {model.name!r}"
    if not _has_call(model):
        parts = [part.name for part in sublayers(model) if not all(layer.built for layer in part._flatten_layers())]
        raise ConfigError(
            f"{', '.join(parts)} has no variables yet, and {type(model).__name__} has no call() that would make them",
            where=where,
            fix="begin its models with keras.Input, or call each on a batch once before fit",
        )
    try:
        model._symbolic_build(iterator=fit.iterator)
        fit.iterator.reset()
    except Exception as error:
        raise ConfigError(
            f"the model has no variables yet, and could not be built from the first batch: {error}",
            where=where,
            fix="build it before fit: begin it with keras.Input, or call it on a batch once",
        ) from error


def _has_call(layer: Any) -> bool:
    return type(layer).call not in (keras.Model.call, keras.layers.Layer.call)


def counts_examples(model: Any) -> bool:
    """Whether the running mean of the loss counts examples: a `train_step` of the user's own may count batches."""
    return type(model).train_step is keras.Model.train_step


def compile_again(model: Any) -> None:
    """Make the model's functions for training, evaluation and prediction anew, if it has them.

    A running `fit` or `evaluate` takes the new function with its next step.
    """
    for function, make in (  # read in each step by the loops of every backend: Keras 3.10.0 and 3.15.1
        ("train_function", model.make_train_function),
        ("test_function", model.make_test_function),
        ("predict_function", model.make_predict_function),
    ):
        if getattr(model, function, None) is not None:
            make(force=True)


def own_variables(layer: Any) -> tuple[list[Any], list[Any]]:
    """The variables that a layer itself holds: (those made as weights to train, all others)."""
    # Layer.trainable_variables would leave out frozen ones and add those of sublayers: Keras 3.10.0 and 3.15.1
    return list(layer._trainable_variables), list(layer._non_trainable_variables)


def sublayers(layer: Any) -> list[Any]:
    """The layers that a layer or model holds directly."""
    return list(layer._flatten_layers(recursive=False, include_self=False))  # Keras 3.10.0 and 3.15.1


def loss_tracker(model: Any) -> Any:
    """Keras's running mean of the loss, with `total` and `count`; None if the model keeps none."""
    return getattr(model, "_loss_tracker", None)  # Keras 3.10.0 and 3.15.1


def learning_rate(optimizer: Any) -> Any:
    """The optimizer's learning rate: a variable, a `LearningRateSchedule` or a function."""
    return optimizer._learning_rate  # `.learning_rate` is the value in this step: Keras 3.10.0 and 3.15.1


def step_counter(optimizer: Any) -> Any:
    """The variable that counts the batches of the optimizer."""
    return optimizer._iterations  # `.iterations` divides by accumulation: Keras 3.10.0 and 3.15.1


def optimized_variables(optimizer: Any) -> list[Any]:
    """The variables of the model that the optimizer trains, in the order of its moments."""
    return list(optimizer._trainable_variables)  # Keras 3.10.0 and 3.15.1


def state_attributes(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the attributes that may hold the optimizer's own state, sorted by name."""
    for attribute, value in sorted(vars(optimizer).items()):
        if attribute not in (_VARIABLES, "_trainable_variables"):  # lists of all variables: Keras 3.10.0 and 3.15.1
            yield attribute, value


def holds_partial_gradients(attribute: str) -> bool:
    """Whether an optimizer's attribute holds the gradients of an accumulation that is not complete."""
    return attribute == "_accumulated_gradients"  # Keras 3.10.0 and 3.15.1


class OptimizerStep:
    """Replaces the step of one optimizer, and adds variables to the optimizer's own.

    A compiled training function takes and returns all of the optimizer's variables, and calls its step once per
    update, with gradients that are accumulated, unscaled and clipped.
    """

    def __init__(self, optimizer: Any) -> None:
        """Change nothing as yet. The optimizer must be built, with no variables but its own."""
        self._optimizer = optimizer
        self._variables: Sequence[Any] = vars(optimizer)[_VARIABLES]  # Keras 3.10.0 and 3.15.1

    def replace(self, step: Callable[[Sequence[Any], Sequence[Any], Any], None]) -> None:
        """Call step(gradients, variables, learning_rate) in place of the optimizer's own step."""
        # BaseOptimizer._backend_update_step, on all backends: Keras 3.10.0 and 3.15.1. Set in the instance's dict,
        # since Keras and TensorFlow would track an attribute that is assigned.
        vars(self._optimizer)[_STEP] = step

    def restore(self) -> bool:
        """Give the optimizer its own step back. Returns whether it had been replaced."""
        return vars(self._optimizer).pop(_STEP, None) is not None

    def run(self, gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        """Run the optimizer's own step."""
        getattr(type(self._optimizer), _STEP)(self._optimizer, gradients, variables, learning_rate)

    def add_variables(self, variables: Sequence[Any]) -> None:
        """Let the optimizer have `variables` beside its own."""
        vars(self._optimizer)[_VARIABLES] = [*self._variables, *variables]  # read by `.variables`

    def remove_variables(self) -> None:
        """Leave the optimizer with its own variables."""
        vars(self._optimizer)[_VARIABLES] = self._variables
