"""The tensors that travel, what the other callbacks of `fit` see, and the files that a run leaves."""

from __future__ import annotations

import threading

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.names import named_variables
from fl_adapters.keras.state import KerasState
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_same_bits
from fl_runtime.errors import ConfigError, HandshakeError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself


# --- names ------------------------------------------------------------------------------------------------------


class Nested(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(3)
        self.rest = [keras.layers.Dense(3), keras.layers.LSTM(2)]
        self.scale = keras.Variable(np.ones(2, "float32"))
        self.shifts = [self.add_weight(shape=(1,), name="shift") for _ in range(2)]

    def call(self, x):
        return self.rest[1](self.rest[0](self.first(x))[:, None]) * self.scale


def functional() -> keras.Model:
    inputs = keras.Input((6,))
    inner = keras.Sequential([keras.layers.Dense(3)])
    shared = keras.layers.Dense(3)
    return keras.Model(inputs, keras.layers.Dense(3)(shared(shared(inner(inputs)))))


def built(model: keras.Model) -> keras.Model:
    model(np.zeros((1, 6), "float32"))
    return model


@pytest.mark.parametrize("make", [m.classifier, functional, Nested])
def test_names_are_those_of_another_process(make) -> None:
    first, second = (list(named_variables(built(make()))) for _ in range(2))
    assert first == second


def test_names_say_where_a_variable_is() -> None:
    expected = "scale|variable shift shift_1 dense/kernel dense/bias dense_1/kernel dense_1/bias"
    names = list(named_variables(built(Nested())))
    assert names[0] in expected and names[1:7] == expected.split()[1:]
    assert names[7:] == [f"lstm/lstm_cell/{part}" for part in ("kernel", "recurrent_kernel", "bias")]
    assert list(named_variables(functional())) == [
        f"{layer}/{part}" for layer in ("sequential/dense", "dense", "dense_1") for part in ("kernel", "bias")
    ]


def test_layers_are_numbered_by_the_names_that_keras_makes_up() -> None:
    kinds = [keras.layers.Conv2D(1, 1), keras.layers.LSTM(1), keras.layers.LayerNormalization(), keras.layers.PReLU()]
    kinds += [keras.layers.MultiHeadAttention(1, 1), keras.layers.GRU(1), keras.layers.SeparableConv1D(1, 1)]
    from fl_adapters.keras.names import _numbered, _snake

    for layer in kinds:
        assert _numbered([(layer.name, _snake(type(layer).__name__))]) == [_snake(type(layer).__name__)]


def test_what_travels_by_default_is_trained_or_kept_beside_it() -> None:
    model = m.classifier()
    assert len(KerasState(model).variables) == 8  # the seed of the dropout layer is not among them
    model.layers[0].trainable = model.layers[1].trainable = False
    assert list(KerasState(model).variables) == ["head/kernel", "head/bias"]
    assert len(KerasState(model, "all").variables) == 8
    assert "frozen layers" in KerasState(model).agreement(model)
    model.layers[1].trainable = True
    assert len(KerasState(model).variables) == 6 and len(KerasState(model, "trainable").variables) == 4


def test_other_frozen_weights_are_refused() -> None:
    def train(place):
        model = m.classifier(seed=place.index)
        model.layers[0].trainable = False
        m.fit(m.compiled(model), m.rows(0), FederatedCallback(kit=place.kit), epochs=2)

    with LocalFederation(sites=2, rounds=2, states=m.STATES) as federation:
        with pytest.raises(HandshakeError, match="frozen layers: these tensors differ: "):
            federation.run(train)


# --- metrics and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validated", [True, False])
def test_saved_files_hold_what_the_exchange_has_left(tmp_path, validated) -> None:
    def train(kit):
        files = keras.callbacks.ModelCheckpoint(str(tmp_path / "epoch-{epoch}.keras"))
        options = {"validation_data": m.rows(9)} if validated else {}
        m.fit(m.compiled(m.classifier()), m.rows(0), files, FederatedCallback(kit=kit), epochs=9, **options)

    with LocalFederation(sites=2, rounds=2, states=m.STATES) as federation:
        _, globals_ = m.with_partner(federation, train)
    for number, weights in enumerate(globals_, start=1):
        saved = keras.saving.load_model(tmp_path / f"epoch-{number}.keras")
        require_same_bits(m.weights(saved), weights)


def test_the_rounds_loss_is_the_mean_over_its_batches() -> None:
    with LocalFederation(sites=1, rounds=2, every=2) as federation:
        losses = []
        log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
        model = m.compiled(m.classifier(dropout=0.0))
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), log, epochs=9)
    running = [losses[0], 2 * losses[1] - losses[0], 3 * losses[2] - 2 * losses[1], losses[3]]  # Keras shows means
    found = [e.data["metrics"]["train_loss"] for e in federation.events if e.kind == "update"]
    assert found == pytest.approx([np.mean(running[:2]), np.mean(running[2:])], rel=1e-4)


def test_evaluate_global_needs_validation_data() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit, evaluate_global=True)
        with pytest.raises(ConfigError, match="validation_data"):
            m.fit(m.compiled(m.classifier()), m.rows(0), callback, epochs=2)


# --- the end ----------------------------------------------------------------------------------------------------


def test_results_open_with_keras_itself(tmp_path) -> None:
    with LocalFederation(sites=1, rounds=3, folder=tmp_path / "run") as federation:
        model = m.compiled(m.classifier(), keras.optimizers.SGD(5.0))  # gets worse
        callback = FederatedCallback(kit=federation.places[0].kit)
        m.fit(model, m.rows(0), callback, epochs=3, validation_data=m.rows(9, 20))
        best = federation.result().best_round
        weights = {"model": federation.model("final"), "best": federation.model("best")}
    for name, expected in weights.items():
        saved = keras.saving.load_model(tmp_path / "run" / name / "model.keras")
        require_same_bits(m.weights(saved), expected)
    assert best < 3
    require_same_bits(m.weights(model), weights["model"])


def test_restoring_the_best_weights_means_the_best_global_round() -> None:
    with LocalFederation(sites=1, rounds=3) as federation:
        model = m.compiled(m.classifier(), keras.optimizers.SGD(5.0))
        stopping = keras.callbacks.EarlyStopping("val_loss", patience=9, restore_best_weights=True)
        callback = FederatedCallback(kit=federation.places[0].kit)
        m.fit(model, m.rows(0), stopping, callback, epochs=3, validation_data=m.rows(9, 20))
        assert federation.result().best_round < 3
        require_same_bits(m.weights(model), federation.model("best"))


def test_what_other_callbacks_monitor_picks_the_best_round() -> None:
    with LocalFederation(sites=1, rounds=3) as federation:
        stopping = keras.callbacks.EarlyStopping("val_accuracy", patience=9, restore_best_weights=True)
        callback = FederatedCallback(kit=federation.places[0].kit)
        model = m.compiled(m.classifier())
        m.fit(model, m.rows(0), stopping, callback, epochs=3, validation_data=m.rows(9, 20))
        result, terms = federation.result(), federation.server.trainings.newest.run.state.plan.terms
        require_same_bits(m.weights(model), federation.model("best"))
    assert (terms.best_metric, terms.best_mode) == ("accuracy", "max")
    assert result.best_round == 1 + int(np.argmax([r.metrics["accuracy"] for r in result.rounds]))


def test_another_best_than_the_jobs_is_refused() -> None:
    with LocalFederation(sites=1, rounds=3, best_metric="accuracy", best_mode="max") as federation:
        stopping = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True)
        callback = FederatedCallback(kit=federation.places[0].kit)
        with pytest.raises(ConfigError, match="'val_loss'.*'accuracy'"):
            m.fit(m.compiled(m.classifier()), m.rows(0), stopping, callback, epochs=3, validation_data=m.rows(9))


def test_a_moving_average_of_the_optimizer_does_not_replace_the_global_model() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        model = m.compiled(m.classifier(), keras.optimizers.SGD(0.1, use_ema=True))
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=2)
        require_same_bits(m.weights(model), federation.model())


@pytest.mark.parametrize(("epochs", "said"), [(9, True), (2, False)])
def test_a_length_that_the_job_replaces_is_said_once(capfd, epochs: int, said: bool) -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        m.fit(m.compiled(m.classifier()), m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=epochs)
    expected = ["fl-adapters: the job's 2 rounds of 1 epoch replace fit(epochs=9)"] if said else []
    assert [line for line in capfd.readouterr().err.splitlines() if "replace" in line] == expected


def test_a_local_early_stop_makes_the_site_leave() -> None:
    class StopAtTwo(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            self.model.stop_training = epoch == 1

    def train(kit):
        m.fit(m.compiled(m.classifier()), m.rows(0), StopAtTwo(), FederatedCallback(kit=kit), epochs=9)

    with LocalFederation(sites=2, rounds=4, min_sites=1, states=m.STATES) as federation:
        m.with_partner(federation, train)
        rounds = federation.result().rounds
    assert [len(r.sites) for r in rounds] == [2, 2, 1, 1]


def test_a_stop_within_an_epoch_sends_no_half_round() -> None:
    class StopInTheMiddle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.model.stop_training = batch == 1

    def train(kit):
        m.fit(m.compiled(m.classifier()), m.rows(0), StopInTheMiddle(), FederatedCallback(kit=kit), epochs=9)

    with LocalFederation(sites=2, rounds=2, min_sites=1, states=m.STATES) as federation:
        m.with_partner(federation, train)
        rounds = federation.result().rounds
    assert [r.sites for r in rounds] == [("site-2",), ("site-2",)]


# --- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adagrad", "Nadam", "SGD", "RMSprop"])
def test_reset_goes_back_to_where_each_optimizer_begins(kind) -> None:
    from fl_adapters.keras.optimizer import KerasOptimizerState

    model = m.compiled(m.classifier(), getattr(keras.optimizers, kind)(0.03))
    state = KerasOptimizerState(model, {n: v.variable for n, v in named_variables(model).items()})
    state.check("reset")
    fresh = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    m.fit(model, m.rows(0))
    model.optimizer.learning_rate = 0.5
    state.reset()
    for variable, value in zip(model.optimizer.variables, fresh, strict=True):
        wanted = np.float32(0.5) if variable is model.optimizer._learning_rate else value
        assert np.array_equal(keras.ops.convert_to_numpy(variable), wanted), variable.path


def refused(optimizer, policy: str, match: str) -> None:
    with LocalFederation(sites=1, rounds=2, optimizer_state=policy) as federation:
        callback, counter = FederatedCallback(kit=federation.places[0].kit), m.Counter()
        with pytest.raises(ConfigError, match=match):
            m.fit(m.compiled(m.classifier(), optimizer), m.rows(0), callback, counter, epochs=2)
    assert counter.batches == 0


def test_policies_that_cannot_work_are_refused() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    refused(keras.optimizers.Adam(schedule), "reset", "'reset'.*begin again in every round")
    refused(keras.optimizers.Adafactor(0.1), "average", "'average'.*factored")


# --- models of many kinds ---------------------------------------------------------------------------------------


def test_a_model_compiled_twice_and_fitted_twice() -> None:
    model = m.compiled(m.classifier())
    for optimizer in (keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)):
        with LocalFederation(sites=1, rounds=2, optimizer_state="reset") as federation:
            m.compiled(model, optimizer)
            m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=2)
            assert len(federation.result().rounds) == 2


def test_a_callback_given_twice_is_refused() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        kit = federation.places[0].kit
        one = FederatedCallback(kit=kit)
        for callbacks in ([one, one], [one, FederatedCallback(kit=kit)]):
            with pytest.raises(ConfigError, match="2 callbacks of the type FederatedCallback"):
                m.fit(m.compiled(m.classifier()), m.rows(0), *callbacks, epochs=2)
        m.fit(m.compiled(m.classifier()), m.rows(0), one, epochs=2)  # and can be used after that
        assert len(federation.result().rounds) == 2


def test_swapped_weights_are_refused() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        swap, optimizer = keras.callbacks.SwapEMAWeights(), keras.optimizers.SGD(0.1, use_ema=True)
        callback, model = FederatedCallback(kit=federation.places[0].kit), m.compiled(m.classifier(), optimizer)
        with pytest.raises(ConfigError, match="SwapEMAWeights"):
            m.fit(model, m.rows(0), callback, swap, epochs=2)


def test_other_callbacks_do_not_change_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    """A forward pass in training mode moves the statistics of batch normalization, and a callback may set weights."""
    seen = {}

    class Meddler(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            self.model(m.rows(7)[0], training=True)

        def on_train_end(self, logs=None) -> None:
            seen[threading.current_thread().name] = m.weights(self.model)
            self.model.set_weights([np.zeros_like(array) for array in self.model.get_weights()])

    def train(place):
        model = m.compiled(m.classifier(seed=place.index))
        meddler = [Meddler()] if place.index == 0 else []
        m.fit(model, m.rows(place.index), FederatedCallback(kit=place.kit), *meddler, epochs=2)
        return m.weights(model)

    with LocalFederation(sites=2, rounds=2, states=m.STATES) as federation:
        first, second = federation.run(train).values()
        final = federation.model()
    for weights in (seen["site-1"], first, second):
        require_same_bits(weights, final)
    assert capfd.readouterr().err.count("a callback changed the weights after the last exchange") == 1
