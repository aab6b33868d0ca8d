"""Models that bring a train_step of their own, as on keras.io: a VAE, a GAN, and distillation."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.export import export
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits
from fl_runtime.errors import ConfigError, HandshakeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras itself
    pytest.mark.skipif(keras.backend.backend() == "jax", reason="with JAX a train_step has another form"),
]

ROUNDS = 2


def step(loss_of, optimizer, variables) -> object:
    """One optimizer step on `loss_of()`, by the backend's own means; returns the loss."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of()
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss
    import torch

    for variable in variables:
        variable.value.grad = None
    loss = loss_of()
    loss.backward()
    with torch.no_grad():
        optimizer.apply([v.value.grad for v in variables], variables)
    return loss.detach()


def dense(name: str, inputs: int, *units: int) -> keras.Model:
    return keras.Sequential([keras.Input((inputs,)), *(keras.layers.Dense(n) for n in units)], name=name)


class OwnStep(keras.Model):
    """A model without call(), as keras.io writes them: it holds models and has a train_step."""

    def __init__(self, **parts: keras.Model) -> None:
        super().__init__()
        self.parts = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)
        self.tracker = keras.metrics.Mean(name="loss")
        if keras.backend.backend() == "torch":
            self.built = True  # what Keras itself asks for there

    @property
    def metrics(self):
        return [self.tracker]


class Autoencoder(OwnStep):
    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        error = lambda: keras.ops.mean(keras.ops.square(self.decoder(self.encoder(x)) - x))  # noqa: E731
        self.tracker.update_state(step(error, self.optimizer, self.trainable_variables))
        return {"loss": self.tracker.result()}


class Gan(OwnStep):
    """Two optimizers of its own, each for one of two models."""

    def compile(self, **optimizers) -> None:
        super().compile()
        self.optimizers = optimizers

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        noise = keras.ops.ones_like(x)[:, :2] / 2
        apart = lambda: keras.ops.mean(self.judge(self.maker(noise)) - self.judge(x))  # noqa: E731
        step(apart, self.optimizers["judging"], self.judge.trainable_variables)
        better = lambda: -keras.ops.mean(self.judge(self.maker(noise)))  # noqa: E731
        self.tracker.update_state(step(better, self.optimizers["making"], self.maker.trainable_variables))
        return {"loss": self.tracker.result()}


class Distiller(OwnStep):
    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        error = lambda: keras.ops.mean(keras.ops.square(self.student(x) - self.teacher(x)))  # noqa: E731
        self.tracker.update_state(step(error, self.optimizer, self.student.trainable_variables))
        return {"loss": self.tracker.result()}


def autoencoder() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = Autoencoder(encoder=dense("encoder", 6, 4, 2), decoder=dense("decoder", 2, 6))
    model.compile(keras.optimizers.SGD(0.05))
    return model


def gan() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = Gan(judge=dense("judge", 6, 1), maker=dense("maker", 2, 6))
    model.compile(judging=keras.optimizers.SGD(0.05), making=keras.optimizers.SGD(0.02))
    return model


def distiller(teacher_seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(teacher_seed)
    teacher = dense("teacher", 6, 3)
    teacher.trainable = False
    keras.utils.set_random_seed(0)
    model = Distiller(student=dense("student", 6, 3), teacher=teacher)
    model.compile(keras.optimizers.SGD(0.05))
    return model


@pytest.mark.parametrize("make", [autoencoder, gan, distiller])
def test_models_without_call_equal_a_loop_that_averages_by_hand(make) -> None:
    sizes = (8, 12)

    def train(place):
        model = make()
        x = m.rows(place.index, sizes[place.index])[0]
        model.fit(x, batch_size=4, shuffle=False, epochs=9, verbose=0, callbacks=[FederatedCallback(kit=place.kit)])
        return m.weights(model)

    with LocalFederation(sites=2, rounds=ROUNDS, states=m.STATES) as federation:
        sites = federation.run(train)
        global_model = federation.model()
    loops = [make() for _ in sizes]
    mean = m.weights(loops[0])
    for _ in range(ROUNDS):
        for loop, size, site in zip(loops, sizes, range(2), strict=True):
            m.load(loop, mean)
            loop.fit(m.rows(site, size)[0], batch_size=4, shuffle=False, verbose=0)
        answers = [m.weights(loop) for loop in loops]
        mean = {n: (answers[0][n] * sizes[0] + answers[1][n] * sizes[1]) / sum(sizes) for n in mean}
    require_close(sites["site-2"], mean, 1e-5)
    travels = {name for name in mean if not name.startswith("teacher")}
    assert set(global_model) == travels
    for weights in sites.values():
        require_same_bits({name: weights[name] for name in global_model}, global_model)


class TwoLosses(Autoencoder):
    """Two running means of its own, as in the VAE and the GAN of keras.io, and none of Keras."""

    def __init__(self, **parts: keras.Model) -> None:
        super().__init__(**parts)
        self.size_tracker = keras.metrics.Mean(name="size")

    @property
    def metrics(self):
        return [self.tracker, self.size_tracker]

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        self.size_tracker.update_state(keras.ops.mean(keras.ops.abs(x)))
        return super().train_step(data)


@pytest.mark.parametrize("every", ["epoch", 1, "2 epochs"])
def test_running_means_of_the_model_itself_are_in_the_history(every: object) -> None:
    x = m.rows(0, 8)[0]

    def made() -> keras.Model:
        keras.utils.set_random_seed(0)
        model = TwoLosses(encoder=dense("encoder", 6, 2), decoder=dense("decoder", 2, 6))
        model.compile(keras.optimizers.SGD(0.05))
        return model

    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    with LocalFederation(sites=1, rounds=2, every=every) as federation:
        made().fit(x, epochs=4, callbacks=[FederatedCallback(kit=federation.places[0].kit, num_examples=8)], **options)
        rounds = [event.data["metrics"] for event in federation.events if event.kind == "update"]
    sizes = [float(np.abs(x[i : i + 4]).mean()) for i in (0, 4)]
    each = sizes if every == 1 else [sum(sizes) / 2] * 2
    assert [metrics["train_size"] for metrics in rounds] == pytest.approx(each, rel=1e-5)
    alone = made().fit(x, epochs=4, **options).history["loss"]
    if every == "epoch":
        assert [metrics["train_loss"] for metrics in rounds] == pytest.approx(alone[:2], rel=1e-5)
    if every == "2 epochs":
        assert [metrics["train_loss"] for metrics in rounds] == pytest.approx(
            [sum(alone[:2]) / 2, sum(alone[2:]) / 2], rel=1e-5
        )


def test_a_frozen_teacher_stays_where_it_is_but_is_the_same_everywhere() -> None:
    def train(place, **options):
        model = distiller(teacher_seed=place.index)
        model.fit(m.rows(0)[0], verbose=0, callbacks=[FederatedCallback(kit=place.kit, **options)])
        return m.weights(model)["teacher/dense/kernel"]

    with LocalFederation(sites=2, rounds=1) as federation, pytest.raises(HandshakeError) as refused:
        federation.run(lambda place: train(place, agree=False))  # which is about names, not about weights
    assert "frozen layers: these tensors differ: teacher/dense" in str(refused.value)
    with LocalFederation(sites=2, rounds=1, states=m.STATES) as federation:
        first, second = federation.run(lambda place: train(place, keep_local=["teacher/*"])).values()
    assert not np.array_equal(first, second)


def batches(size: int, options: str):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(m.rows(0, size)[0])
    if "shuffled" in options:
        data = data.shuffle(8, seed=1)
    data = data.batch(4, drop_remainder="whole" in options).map(lambda x: x * 1.0).prefetch(1)
    return data.filter(lambda x: True) if "unknown" in options else data


@pytest.mark.parametrize(("options", "weight"), [("", 10), ("shuffled", 10), ("whole", 8)])
def test_the_weight_of_a_dataset_is_its_number_of_rows(options, weight) -> None:
    pytest.importorskip("tensorflow")
    with LocalFederation(sites=1, rounds=1) as federation:
        autoencoder().fit(batches(10, options), verbose=0, callbacks=[FederatedCallback(kit=federation.places[0].kit)])
        (update,) = [event for event in federation.events if event.kind == "update"]
    assert update.data["num_examples"] == weight


def test_data_of_unknown_size_is_refused_before_the_first_step() -> None:
    pytest.importorskip("tensorflow")
    counter = m.Counter()
    with LocalFederation(sites=1, rounds=1) as federation:
        kit = federation.places[0].kit
        with pytest.raises(ConfigError, match="num_examples="):
            autoencoder().fit(batches(10, "unknown"), verbose=0, callbacks=[FederatedCallback(kit=kit), counter])
    assert counter.batches == 0
    with LocalFederation(sites=1, rounds=1) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit, num_examples=10)
        autoencoder().fit(batches(10, "unknown"), verbose=0, callbacks=[callback])
        assert len(federation.result().rounds) == 1


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere Keras builds the model itself")
def test_parts_without_variables_are_named() -> None:
    model = Autoencoder(
        encoder=keras.Sequential([keras.layers.Dense(2)], name="squeeze"), decoder=dense("decoder", 2, 6)
    )
    model.compile("sgd")
    with (
        LocalFederation(sites=1, rounds=1) as federation,
        pytest.raises(ConfigError, match="^squeeze has no variables"),
    ):
        model.fit(m.rows(0)[0], verbose=0, callbacks=[FederatedCallback(kit=federation.places[0].kit)])


def test_a_model_that_keras_cannot_save_leaves_its_weights_and_says_so(tmp_path: Path) -> None:
    class Unsaved(Autoencoder):
        def get_config(self):
            raise NotImplementedError("it holds an open file")

    def made() -> keras.Model:
        return Unsaved(encoder=dense("encoder", 6, 2), decoder=dense("decoder", 2, 6))

    model, other = made(), made()
    with pytest.warns(UserWarning, match="no model.keras .it holds an open file"):
        export(model, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.weights.h5"]
    other.built = True
    other.load_weights(tmp_path / "model.weights.h5")
    require_same_bits(m.weights(other), m.weights(model))
    assert model.built == (keras.backend.backend() == "torch")
