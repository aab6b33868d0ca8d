"""Layers that follow the data they saw before `fit`: each site computes with the statistics that travel."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.local_work.standby_model import KerasStandbyModel
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits
from fl_runtime.errors import HandshakeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras itself
    pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning"),
]

ROUNDS = 3
SCALES = (1.0, 30.0)


def scaled_rows(site: int) -> tuple[np.ndarray, np.ndarray]:
    """A site's rows in a unit of its own, so that its statistics are far from those of the other."""
    x, y = m.rows(site)
    return (x * SCALES[site] + 5 * site).astype("float32"), y


@keras.saving.register_keras_serializable()
class Scale(keras.layers.Layer):
    """A layer of a user's own that multiplies by a copy of its variable."""

    def build(self, shape) -> None:
        self.amount = self.add_weight(name="amount", shape=(), initializer="ones", trainable=False)
        self.finalize_state()

    def finalize_state(self) -> None:
        self.factor = keras.ops.convert_to_tensor(keras.ops.convert_to_numpy(self.amount))

    def call(self, x):
        return x * self.factor


def adapted(site: int) -> keras.Model:
    """The layers adapt to this site's rows, as a script does before fit."""
    keras.utils.set_random_seed(site)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Normalization(), Scale(), keras.layers.Dense(3)])
    model.layers[0].adapt(scaled_rows(site)[0])
    model.layers[1].amount.assign(1.0 + site)
    model.layers[1].finalize_state()
    return m.compiled(model, keras.optimizers.SGD(0.1))


def plain_loop() -> dict[str, np.ndarray]:
    """The same rounds by hand: rows are normalised in NumPy by the statistics of site 1, which begins the run."""
    mean, variance = scaled_rows(0)[0].mean(0), scaled_rows(0)[0].var(0)
    models = [m.compiled(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])) for _ in range(2)]
    weights = adapted(0).layers[-1].get_weights()
    for _ in range(ROUNDS):
        answers = []
        for site, model in enumerate(models):
            model.compile(keras.optimizers.SGD(0.1), model.loss)
            model.set_weights(weights)
            x, y = scaled_rows(site)
            m.fit(model, ((x - mean) / np.sqrt(variance), y))
            answers.append(model.get_weights())
        weights = [np.mean(pair, axis=0) for pair in zip(*answers, strict=True)]
    return {"dense/kernel": weights[0], "dense/bias": weights[1]}


def test_sites_compute_with_the_statistics_of_the_global_model(capfd: pytest.CaptureFixture[str]) -> None:
    probe = m.rows(9)[0]

    def train(place):
        model = adapted(place.index)
        predicts_before = model.predict(probe, verbose=0)  # Keras keeps what it compiles for this
        history = m.fit(
            model,
            scaled_rows(place.index),
            FederatedCallback(kit=place.kit),
            epochs=ROUNDS,
            validation_data=scaled_rows(place.index),
        )
        path = Path(f"{place.name}.keras")
        model.save(path)
        scores = np.array([history.history["val_loss"][-1], model.evaluate(*scaled_rows(place.index), verbose=0)[0]])
        return model, predicts_before, model.predict(probe, verbose=0), keras.saving.load_model(path), scores

    with LocalFederation(sites=2, rounds=ROUNDS, states=m.STATES) as federation:
        sites = federation.run(train)
        global_model = federation.model()
    plain = plain_loop()
    require_close({name: global_model[name] for name in plain}, plain)
    expected = (probe - scaled_rows(0)[0].mean(0)) / scaled_rows(0)[0].std(0) @ global_model["dense/kernel"]
    for model, before, predicted, loaded, scores in sites.values():
        require_same_bits(m.weights(model), global_model)
        np.testing.assert_allclose(predicted, expected + global_model["dense/bias"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(loaded.predict(probe, verbose=0), predicted, rtol=1e-5, atol=1e-6)
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
        assert np.abs(before - predicted).max() > 0.1
    told = [line for line in capfd.readouterr().err.splitlines() if "statistics of the global model" in line]
    assert len(told) == 1 and "normalization, scale" in told[0]  # site 2 alone


def test_statistics_that_stay_at_the_site_are_its_own() -> None:
    def train(place):
        model = adapted(place.index)
        m.fit(model, scaled_rows(place.index), FederatedCallback(kit=place.kit, keep_local=["normalization/*"]))
        return model.predict(scaled_rows(place.index)[0], verbose=0)

    with LocalFederation(sites=2, rounds=1, states=m.STATES) as federation:
        predicted = federation.run(train)["site-2"]
        weights = federation.model()
    x = scaled_rows(1)[0]
    own = (x - x.mean(0)) / x.std(0) @ weights["dense/kernel"] + weights["dense/bias"]
    np.testing.assert_allclose(predicted, own, rtol=1e-3, atol=1e-4)


def test_a_personal_model_computes_with_its_own_statistics() -> None:
    model, probe = adapted(0), scaled_rows(1)[0]
    m.fit(model, scaled_rows(0))  # builds the optimizer, and compiles
    standby = KerasStandbyModel(model)
    mean = np.arange(6, dtype="float32")
    standby.set_weights({**standby.weights(), "normalization/mean": mean})
    own = model.predict(probe, verbose=0)
    standby.swap()
    weights = m.weights(model)
    expected = (probe - mean) / scaled_rows(0)[0].std(0) @ weights["dense/kernel"] + weights["dense/bias"]
    np.testing.assert_allclose(model.predict(probe, verbose=0), expected, rtol=1e-3, atol=1e-3)
    standby.swap()
    np.testing.assert_array_equal(model.predict(probe, verbose=0), own)


WORDS = (["the cat sat", "the dog ran"], ["the cat sat", "the fox hid"])


class Reader(keras.Model):
    """A model whose layers adapt to the texts and numbers of a site."""

    def __init__(self, *, words: int = 0, bins: int = 0, code: int = 0, buckets: int = 8, **text) -> None:
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.text = keras.layers.TextVectorization(output_mode="tf_idf", **text)
        self.text.adapt(WORDS[words])
        self.bins = keras.layers.Discretization(num_bins=3)
        self.bins.adapt(m.rows(bins)[0][:, 0])
        self.codes = keras.layers.IntegerLookup(vocabulary=[3, 5, 7 + code])
        self.buckets = keras.layers.Hashing(buckets)

    def call(self, x):
        return self.head(x)


def train_readers(*readers) -> LocalFederation:
    """Train one site for each reader."""

    def train(place):
        model = m.compiled(readers[place.index]())
        model(m.rows(0)[0])
        m.fit(model, m.rows(0), FederatedCallback(kit=place.kit))

    with LocalFederation(sites=len(readers), rounds=1, states=m.STATES) as federation:
        federation.run(train)
        return federation.result()


@pytest.mark.parametrize(
    ("other", "found", "equal"),
    [
        (
            {"words": 1},
            ["vocabulary of text_vectorization: the first that differ are among 0 to 5 (their text stays"],
            ["settings of"],
        ),
        ({"bins": 1}, ["bins of discretization", "stays at the sites"], ["vocabulary", "settings of"]),
        ({"code": 1}, ["vocabulary of integer_lookup: 3: '7' != '8'"], ["settings of", "text_"]),
        ({"buckets": 9}, ["settings of", "'hashing: num_bins=8' != 'hashing: num_bins=9'"], ["vocabulary"]),
        (
            {"ngrams": 2},
            ["'text_vectorization: ngrams=None' != 'text_vectorization: ngrams=2'"],
            ["bins of", "hashing"],
        ),
    ],
)
def test_what_layers_learned_from_different_data_is_refused_by_name(other, found, equal) -> None:
    with pytest.raises(HandshakeError) as refused:
        train_readers(Reader, lambda: Reader(**other))
    text = str(refused.value)
    assert all(part in text for part in found) and not any(part in text for part in equal), text


def test_equal_vocabularies_train() -> None:
    reader = lambda: Reader(standardize=lambda text: text)  # noqa: E731 (a new function, with another address)
    assert len(train_readers(reader, reader).rounds) == 1
