"""Small Keras models and data, and trainings of them with and without a federation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.names import named_variables
from fl_adapters.keras.state import KerasState, to_host
from fl_adapters.loop import connect
from fl_adapters.testing import Correct, LocalFederation, Place, Trained, failing
from fl_adapters.testing.conformance.adapter import copied
from fl_adapters.testing.local_federation import State
from fl_runtime.types import Array, Arrays

BATCH, BATCHES = 4, 3
ROWS = BATCH * BATCHES

if keras.backend.backend() == "torch":
    import torch

    torch.set_num_threads(1)
    STATES: Sequence[State] = [(torch.get_rng_state, torch.set_rng_state)]
else:
    STATES = []  # Keras draws from the seeds that each layer keeps


def classifier(*, seed: int = 0, width: int = 5, dropout: float = 0.3) -> keras.Model:
    """Return a classifier with dense layers, batch normalization, dropout, and a head with its own name."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.6),
            keras.layers.Dropout(dropout, seed=seed),  # else PyTorch draws from its global generator
            keras.layers.Dense(3, name="head"),
        ]
    )


def rows(seed: int, size: int = ROWS) -> tuple[Array, Array]:
    """Return points of three classes, drawn with `seed`."""
    draw = np.random.RandomState(seed)
    labels = draw.randint(0, 3, size)
    return (draw.normal(size=(size, 6)) + labels[:, None]).astype("float32"), labels.astype("int32")


def compiled(model: keras.Model, optimizer: Any = None, **options: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"loss": loss, "metrics": ["accuracy"], **options}
    model.compile(optimizer=optimizer or keras.optimizers.Adam(0.01), **options)
    return model


def fit(model: keras.Model, data: tuple[Array, Array], *callbacks: Any, **options: Any) -> keras.callbacks.History:
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    return model.fit(*data, callbacks=list(callbacks), **options)


def weights(model: keras.Model) -> dict[str, Array]:
    """Return all weights under the names that travel."""
    return {name: to_host(named.variable) for name, named in named_variables(model).items()}


def load(model: keras.Model, arrays: Arrays) -> None:
    for name, named in named_variables(model).items():
        named.variable.assign(np.array(arrays[name]))


class Counter(keras.callbacks.Callback):
    """Counts batches, and fails at a given one."""

    def __init__(self, fail_at: int = 0) -> None:
        super().__init__()
        self.batches, self.fail_at = 0, fail_at

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches == self.fail_at:
            failing()


class At(keras.callbacks.Callback):
    """Calls `work(self, epoch, logs)` at the end of each epoch."""

    def __init__(self, work: Callable[[Any, int, Any], None]) -> None:
        super().__init__()
        self._work = work

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._work(self, epoch, logs)


def with_partner(
    federation: LocalFederation,
    train: Callable[[str], Any],
    work: Callable[[Arrays], Arrays] = lambda arrays: {n: a / 2 for n, a in arrays.items()},
    model: keras.Model | None = None,
) -> tuple[Any, list[dict[str, Array]]]:
    """Run train(kit) as the first of two sites; the second answers each round with `work`.

    Returns:
        What `train` returns, and the global models in order.
    """
    state = KerasState(model or classifier())
    received: list[dict[str, Array]] = []

    def partner(place: Place) -> None:
        with connect(kit=place.kit) as site:
            for task in site.tasks(initial=state.get_state(), agreement=state.agreement(model or classifier())):
                arrays = copied(task.arrays)
                received.append(arrays)
                task.submit(work(copied(arrays)), num_examples=ROWS)
            received.append(copied(site.arrays))

    first, second = federation.places
    outcomes = federation.outcomes({first.name: lambda place: train(place.kit), second.name: partner})
    return outcomes[first.name].value, received[1:]


class Executions(keras.callbacks.Callback):
    """Notes where each call of the compiled step function begins, by the hooks' own numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.begins: list[int] = []

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self.begins.append(batch)


def trained(callback: keras.callbacks.Callback | None = None, size: int = ROWS, **options):
    """Train one site; return the federation's update events, and where its steps began."""
    compile_options = {k: options.pop(k) for k in ("steps_per_execution", "optimizer") if k in options}
    settings = options.pop("settings")
    executions = Executions()
    with LocalFederation(sites=1, **settings) as federation:
        model = compiled(classifier(), **compile_options)
        callback = FederatedCallback(kit=federation.places[0].kit, **options.pop("arguments", {}))
        fit(model, rows(0, size), callback, executions, **options)
        federation.result()
    return [e for e in federation.events if e.kind == "update"], executions.begins


def cell(kit: str, *callbacks: keras.callbacks.Callback, epochs: int = 4, **options) -> keras.Model:
    model = compiled(classifier(dropout=0.0))  # Keras does not back up the states of random generators
    fit(model, rows(0), *callbacks, FederatedCallback(kit=kit), epochs=epochs, **options)
    return model


def steady_adam(rate: Any, **options: Any) -> keras.optimizers.Adam:
    """Adam with so large an epsilon that it blows up no rounding error of a gradient."""
    return keras.optimizers.Adam(rate, epsilon=0.1, **options)


class Example:
    """The training job of the conformance suite."""

    steps_per_epoch = BATCHES
    personal = "batch_normalization/*"
    states = STATES

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        model = compiled(classifier(seed=site, width=7 if different else 5), steady_adam(0.01))
        counter = Counter(fail_at)
        fit(model, rows(site), FederatedCallback(**arguments), counter, epochs=epochs)
        return Trained(weights(model), counter.batches)

    def plain(self, site: int, *, total_steps: int) -> RepeatedFit:
        return RepeatedFit(compiled(classifier(seed=site), steady_adam(0.01)), rows(site))


class RepeatedFit:
    """The reference: one `fit` after another over the next batches."""

    num_examples = ROWS

    def __init__(self, model: keras.Model, data: tuple[Array, Array]) -> None:
        self._model, self._data, self._next = model, data, 0

    def weights(self) -> Arrays:
        return weights(self._model)

    def load(self, arrays: Arrays) -> None:
        load(self._model, arrays)

    def reset_optimizer(self) -> None:
        optimizer = self._model.optimizer
        for variable in optimizer.variables:
            if variable is not optimizer._learning_rate:
                variable.assign(np.zeros(tuple(variable.shape), variable.dtype))

    def train(self, steps: int) -> None:
        batches = [(self._next + i) % BATCHES for i in range(steps)]
        order = np.concatenate([np.arange(BATCH) + BATCH * batch for batch in batches])
        self._next += steps
        fit(self._model, tuple(part[order] for part in self._data))


class CorrectedExample(Example):
    """The training job beside a plain loop that computes its own gradients.

    Attributes:
        kind: The optimizer, "adam" or "sgd".
        clipnorm: Limit for the norm of each gradient.
        accumulate: Batches per optimizer step.
        policy: The layers' dtype policy, such as "mixed_float16".
    """

    def __init__(self, kind: str, clipnorm: float | None = None, accumulate: int = 1, policy: str = "float32") -> None:
        self.kind, self.clipnorm, self.accumulate, self.policy = kind, clipnorm, accumulate, policy
        self.plain_sgd, self.steps_per_epoch = kind == "sgd", BATCHES // accumulate

    def optimizer(self, **options: Any) -> Any:
        rates = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.8)
        if self.accumulate > 1:
            options["gradient_accumulation_steps"] = self.accumulate
        if self.kind == "sgd":
            return keras.optimizers.SGD(rates, **options)
        return steady_adam(rates, **options)

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        with self.dtypes():
            model = compiled(classifier(seed=site), self.optimizer(clipnorm=self.clipnorm))
        counter = Counter()
        fit(model, rows(site), FederatedCallback(**arguments), counter, epochs=epochs)
        return Trained(weights(model), counter.batches // self.accumulate)

    def plain(self, site: int, *, total_steps: int) -> OwnGradients:
        with self.dtypes():
            model = compiled(classifier(seed=site), self.optimizer())
        return OwnGradients(model, rows(site), self.clipnorm, self.accumulate)

    @contextmanager
    def dtypes(self) -> Iterator[None]:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.policy)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(before)


class OwnGradients(RepeatedFit):
    """The reference for corrections: gradients by the backend's own means, clipped, corrected and applied here."""

    def __init__(self, model: keras.Model, data: tuple[Array, Array], clipnorm: float | None, accumulate: int) -> None:
        super().__init__(model, data)
        self._clipnorm, self._accumulate = clipnorm, accumulate
        self.correct: Correct | None = None
        self.rates: list[float] = []

    def exchange_optimizer(self, state: Any) -> Any:
        optimizer = getattr(self._model.optimizer, "inner_optimizer", self._model.optimizer)
        if not optimizer.built:
            optimizer.build(self._model.trainable_variables)
        before = [np.array(to_host(variable)) for variable in optimizer.variables]
        for i, variable in enumerate(optimizer.variables):
            variable.assign(np.zeros_like(before[i]) if state is None else state[i])
        return before

    def train(self, steps: int) -> None:
        names = {id(named.variable): name for name, named in named_variables(self._model).items()}
        optimizer, variables = self._model.optimizer, self._model.trainable_variables
        for _ in range(steps):
            for part in range(self._accumulate):
                batch = slice(BATCH * (self._next % BATCHES), BATCH * (self._next % BATCHES + 1))
                self._next += 1
                gradients, scale = gradients_of(self._model, *(data[batch] for data in self._data))
                finite = all(np.isfinite(gradient).all() for gradient in gradients)  # else loss scaling skips the step
                if finite and part + 1 == self._accumulate:
                    self.rates.append(float(to_host(optimizer.learning_rate)))
                for i, variable in enumerate(variables if finite else ()):
                    gradient = gradients[i] / scale
                    if self._clipnorm is not None:
                        gradient = gradient * np.float32(self._clipnorm / max(np.linalg.norm(gradient), self._clipnorm))
                    if self.correct is not None:
                        gradient = self.correct(names[id(variable)], to_host(variable), gradient)
                    gradients[i] = np.asarray(gradient * scale, "float32")
                optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], variables)


def gradients_of(model: keras.Model, x: Array, y: Array) -> tuple[list[Array], np.float32]:
    """Return a gradient for each trainable variable, and the factor of loss scaling in them."""
    optimizer, scale = model.optimizer, np.float32(1)
    if hasattr(optimizer, "inner_optimizer"):
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        scale = to_host(optimizer.dynamic_scale)
    if keras.backend.backend() == "torch":
        model.zero_grad()
        (model.loss(y, model(x, training=True)) * float(scale)).backward()
        return [np.array(v.value.grad.numpy()) for v in model.trainable_variables], scale
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True)) * scale
        return [g.numpy() for g in tape.gradient(loss, [v.value for v in model.trainable_variables])], scale
    import jax

    def loss_of(trained: Any, others: Any) -> Any:
        scores, others = model.stateless_call(trained, others, x, training=True)
        return model.loss(y, scores) * scale, others

    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    found, others = jax.grad(loss_of, has_aux=True)(*values)
    for variable, value in zip(model.non_trainable_variables, others, strict=True):
        variable.assign(value)
    return [np.array(gradient) for gradient in found], scale
