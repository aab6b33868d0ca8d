"""The parts that depend on the backend: this file and the conformance suite run on each of them."""

from __future__ import annotations

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits
from fl_runtime.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself
SEVERAL = pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras refuses steps_per_execution on PyTorch")


def test_metrics_and_files_at_the_end_of_an_epoch_are_those_of_the_global_model() -> None:
    data, validation = m.rows(0), m.rows(9, 20)

    def train(kit):
        files = keras.callbacks.ModelCheckpoint("epoch-{epoch}.keras", monitor="val_loss")
        model = m.compiled(m.classifier())
        history = m.fit(model, data, files, FederatedCallback(kit=kit), epochs=9, validation_data=validation)
        return files.filepath, model, history.history

    with LocalFederation(sites=2, rounds=3, states=m.STATES) as federation:
        (path, model, history), globals_ = m.with_partner(federation, train)
        scores = [r.metrics["loss"] for r in federation.result().rounds]
    assert path.startswith(str(federation.folder))
    # folders are gone with the federation; the files were written below it
    assert len(history["val_loss"]) == len(globals_) == 3
    for number, (loss, weights) in enumerate(zip(history["val_loss"], globals_, strict=True)):
        twin = m.compiled(m.classifier())
        m.load(twin, weights)
        assert twin.evaluate(*validation, verbose=0, batch_size=m.BATCH)[0] == pytest.approx(loss, rel=1e-4)
        assert scores[number] == pytest.approx(loss, rel=1e-6)
    require_same_bits(m.weights(model), globals_[-1])
    assert history["federation_round"] == [1.0, 2.0, 3.0]
    assert all(b > 0 for b in history["federation_bytes_up"]) and len(history["federation_seconds"]) == 3


@pytest.mark.parametrize("options", [{"every": 2}, {"every": "epoch", "validation_freq": 2}])
def test_global_models_that_fit_does_not_validate_are_scored_all_the_same(options) -> None:
    every, options = options.pop("every"), {"epochs": 9, "validation_data": m.rows(9, 20), **options}
    plain = m.compiled(m.classifier())
    m.fit(plain, m.rows(0), epochs=2)
    with LocalFederation(sites=1, rounds=4, every=every) as federation:
        model = m.compiled(m.classifier())
        history = m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), **options)
        rounds = federation.result().rounds
    assert all("accuracy" in r.metrics for r in rounds)
    final = model.evaluate(*m.rows(9, 20), verbose=0)[0]
    assert rounds[-1].metrics["loss"] == pytest.approx(final, rel=1e-5)
    if every == 2:  # one site: training goes on as if nothing had been evaluated in between
        assert history.history["loss"][:2] == pytest.approx(plain.history.history["loss"], rel=1e-5)


def test_averaged_moments_equal_those_averaged_by_hand() -> None:
    def train(place):
        model = m.compiled(m.classifier(seed=place.index))
        m.fit(model, m.rows(place.index), FederatedCallback(kit=place.kit), epochs=3)
        return m.weights(model)

    with LocalFederation(sites=2, rounds=3, optimizer_state="average", states=m.STATES) as federation:
        weights = federation.run(train)["site-1"]
    sites = [m.compiled(m.classifier(seed=site)) for site in range(2)]
    loops = [m.RepeatedFit(model, m.rows(site)) for site, model in enumerate(sites)]
    mean = loops[0].weights()
    for _ in range(3):
        for loop in loops:
            loop.load(mean)
            loop.train(m.BATCHES)
        mean = {n: np.mean([loop.weights()[n] for loop in loops], axis=0, dtype=np.float64) for n in mean}
        mean = {n: a.astype("float32") for n, a in mean.items()}
        for pair in zip(*(model.optimizer.variables for model in sites), strict=True):
            value = np.mean([keras.ops.convert_to_numpy(v) for v in pair], axis=0)  # rates and counters are equal
            for variable in pair:
                variable.assign(value.astype(keras.backend.standardize_dtype(variable.dtype)))
    require_close(weights, mean)


def test_a_reset_optimizer_begins_like_a_new_one() -> None:
    """After a reset, Adam's first step has the length of the learning rate for every weight."""
    steps = []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            self.before = m.weights(self.model)["head/kernel"]

        def on_train_batch_end(self, batch, logs=None) -> None:
            steps.append(np.abs(m.weights(self.model)["head/kernel"] - self.before).max())

    with LocalFederation(sites=1, rounds=3, optimizer_state="reset") as federation:
        model = m.compiled(m.classifier(), keras.optimizers.Adam(0.01))
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), Steps(), epochs=3)
    assert steps[:: m.BATCHES] == pytest.approx([0.01] * 3, rel=1e-3)


@keras.saving.register_keras_serializable()
class OwnStep(keras.Model):
    """A model with a custom train_step that any backend can run."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(5, dtype="mixed_float16")
        self.head = keras.layers.Dense(3)

    def build(self, shape) -> None:
        self.hidden.build(shape)
        self.head.build((None, 5))

    def call(self, x):
        return self.head(self.hidden(x))

    def train_step(self, *args):
        return super().train_step(*args)


def test_custom_train_step_and_mixed_precision() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=64.0)
    results = []
    for policy in ("keep", "reset", "average"):
        with LocalFederation(sites=1, rounds=2, optimizer_state=policy) as federation:
            optimizer = type(optimizer).from_config(optimizer.get_config())
            keras.utils.set_random_seed(0)
            model = m.compiled(OwnStep(), optimizer)
            model.build((None, 6))
            m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=2)
            require_same_bits(m.weights(model), federation.model())
        results.append(m.weights(model)["dense/kernel"])
        assert float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale)) == 64.0
        assert int(model.optimizer.inner_optimizer.iterations) == (0 if policy == "reset" else 6)
    assert np.array_equal(results[0], results[2]) and not np.array_equal(results[0], results[1])


def test_an_unbuilt_model_is_built() -> None:
    def unbuilt() -> keras.Model:
        return m.compiled(keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)]))

    with LocalFederation(sites=1, rounds=2) as federation:
        model = unbuilt()
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=2)
        require_same_bits(m.weights(model), federation.model())


@SEVERAL
def test_executions_of_several_steps() -> None:
    updates, begins = m.trained(settings={"rounds": 2, "every": 4}, steps_per_execution=2, size=6 * m.BATCH, epochs=9)
    assert begins == [0, 2, 4, 0]
    assert [u.data["local_steps"] for u in updates] == [4, 4]


@SEVERAL
def test_an_epoch_that_is_no_multiple_of_the_execution() -> None:
    updates, begins = m.trained(settings={"rounds": 2}, steps_per_execution=2, size=5 * m.BATCH, epochs=9)
    assert begins == [0, 2, 4] * 2
    assert [u.data["local_steps"] for u in updates] == [5, 5]


@SEVERAL
@pytest.mark.parametrize(("every", "size"), [(3, 6), (4, 5)])
def test_rounds_that_end_within_an_execution_are_refused(every, size) -> None:
    with pytest.raises(ConfigError, match="steps_per_execution=2"):
        m.trained(settings={"rounds": 2, "every": every}, steps_per_execution=2, size=size * m.BATCH, epochs=9)


@pytest.mark.parametrize("settings", [{"rounds": 4}, {"rounds": 2, "every": "2 epochs"}], ids=["epoch", "2 epochs"])
@pytest.mark.parametrize("fails_in", [1, 2])
def test_a_fit_resumed_from_its_backup_ends_as_if_nothing_had_happened(settings, fails_in) -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            if self.epoch == fails_in and batch == 1:
                raise RuntimeError("the power is gone")

        def on_epoch_begin(self, epoch, logs=None) -> None:
            self.epoch = epoch

    def interrupted(kit):
        with pytest.raises(RuntimeError, match="power"):
            m.cell(kit, keras.callbacks.BackupAndRestore("backup"), Fails())
        counter = m.Counter()
        model = m.cell(kit, keras.callbacks.BackupAndRestore("backup"), counter)
        return m.weights(model), counter.batches

    with LocalFederation(sites=2, states=m.STATES, **settings) as federation:
        whole, _ = m.with_partner(federation, lambda kit: m.weights(m.cell(kit)))
    with LocalFederation(sites=2, states=m.STATES, **settings) as federation:
        (weights, batches), _ = m.with_partner(federation, interrupted)
    require_same_bits(weights, whole)
    assert batches == (4 - fails_in) * m.BATCHES
