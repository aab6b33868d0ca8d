"""`adapt`: layers hold what Keras computes on the data of all sites in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_models as m
import numpy as np
import pytest
import tensorflow as tf

from fl_adapters.keras import FederatedCallback, adapt
from fl_adapters.testing import LocalFederation
from fl_runtime.errors import ConfigError, FederationError, HandshakeError

pytestmark = pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning")

TEXTS = (
    ["Red fish, red boat", "blue boat", ""],
    ["green fish"],
    ["red sky red sky red", "Zürich fish", "blue", "boat boat boat"],
    ["", "!"],
)
WORDS = (["north", "east", "north"], ["west"], ["east", "[UNK]", "south", "south", "east"], ["[UNK]"])
CODES = ([3, 1, 3, 12], [7], [1, 5, 3, 5])


def over_sites(make: Callable[[], Any], parts: Sequence[Any], **arguments: Any) -> list[Any]:
    """Adapt a layer at each site to its part, and return the layers."""

    def work(place: Any) -> Any:
        layer = make()
        adapt(layer, parts[place.index], kit=place.kit, **arguments)
        return layer

    with LocalFederation(sites=len(parts)) as federation:
        return list(federation.run(work).values())


def statistics(layer: Any) -> tuple[Any, Any]:
    return keras.ops.convert_to_numpy(layer.mean), keras.ops.convert_to_numpy(layer.variance)


@pytest.mark.parametrize("axis", [-1, None, (1, 2)])
def test_normalization_has_the_statistics_of_all_rows(axis: Any) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(1000 + 3 * n, 1 + n, size=(size, 4, 3)).astype("float32") for n, size in enumerate((5, 1, 40))]
    layers = over_sites(lambda: keras.layers.Normalization(axis=axis), [parts[0], [parts[1]], parts[2]])
    central = keras.layers.Normalization(axis=axis)
    central.adapt(np.concatenate(parts).astype("float64"))
    for layer in layers:
        for ours, first in zip(statistics(layer), statistics(layers[0]), strict=True):
            assert ours.tobytes() == first.tobytes()
        for ours, expected in zip(statistics(layer), statistics(central), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6)
        rows = np.concatenate(parts)
        np.testing.assert_allclose(np.asarray(layer(rows[:8])).mean(), np.asarray(central(rows[:8])).mean(), rtol=1e-4)


@pytest.mark.parametrize("mode", ["int", "multi_hot", "tf_idf"])
@pytest.mark.parametrize("most", [None, 5])
def test_a_text_vectorization_has_the_vocabulary_and_weights_of_all_texts(mode: str, most: int | None) -> None:
    def make() -> Any:
        return keras.layers.TextVectorization(output_mode=mode, max_tokens=most)

    central = make()
    central.adapt([text for part in TEXTS for text in part])
    batched = tf.data.Dataset.from_tensor_slices(TEXTS[2]).batch(3)
    for layer in over_sites(make, [TEXTS[0], np.array(TEXTS[1]), batched, TEXTS[3]]):
        assert layer.get_vocabulary() == central.get_vocabulary()
        texts = ["red fish Zürich unknown", "boat"]
        np.testing.assert_allclose(np.asarray(layer(texts)), np.asarray(central(texts)), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"mask_token": "north", "num_oov_indices": 2}, {"output_mode": "one_hot"}])
def test_a_lookup_of_texts_has_the_vocabulary_of_all_sites(options: dict[str, Any]) -> None:
    central = keras.layers.StringLookup(**options)
    central.adapt(np.array([word for part in WORDS for word in part]))
    for layer in over_sites(lambda: keras.layers.StringLookup(**options), [np.array(words) for words in WORDS]):
        assert layer.get_vocabulary() == central.get_vocabulary()
        np.testing.assert_array_equal(np.asarray(layer(WORDS[2])), np.asarray(central(WORDS[2])))


def test_a_lookup_of_integers_has_the_vocabulary_of_all_sites() -> None:
    central = keras.layers.IntegerLookup(max_tokens=4)
    central.adapt(np.concatenate(CODES))
    for layer in over_sites(lambda: keras.layers.IntegerLookup(max_tokens=4), [np.array(codes) for codes in CODES]):
        assert layer.get_vocabulary() == central.get_vocabulary()


def test_rare_tokens_stay_at_their_site() -> None:
    layers = over_sites(keras.layers.StringLookup, [np.array(words) for words in WORDS], min_count=2)
    assert [layer.get_vocabulary() for layer in layers] == [["[UNK]", "south", "north", "east"]] * 4


def test_a_model_trains_on_layers_that_adapted_over_the_sites() -> None:
    """The handshake of the training finds equal layers, and has nothing to replace."""

    def work(place: Any) -> Any:
        layer = keras.layers.Normalization()
        x, y = m.rows(place.index)
        adapt(layer, x, kit=place.kit)
        adapted = statistics(layer)
        model = m.compiled(keras.Sequential([keras.Input(x.shape[1:]), layer, keras.layers.Dense(3)]))
        m.fit(model, (x, y), FederatedCallback(kit=place.kit), epochs=9)
        return adapted, statistics(layer)

    with LocalFederation(sites=2, rounds=2) as federation:
        for before, after in federation.run(work).values():
            assert [array.tobytes() for array in before] == [array.tobytes() for array in after]


def test_without_a_federation_it_is_the_layers_own() -> None:
    ours, theirs = keras.layers.Normalization(), keras.layers.Normalization()
    rows = np.random.default_rng(1).normal(size=(9, 2)).astype("float32")
    adapt(ours, rows)
    theirs.adapt(rows)
    assert [part.tobytes() for part in statistics(ours)] == [part.tobytes() for part in statistics(theirs)]


def test_layers_that_differ_are_refused() -> None:
    def work(place: Any) -> None:
        adapt(keras.layers.StringLookup(max_tokens=5 + place.index), np.array(["a"]), kit=place.kit)

    with LocalFederation(sites=2) as federation:
        outcomes = federation.outcomes({place.name: work for place in federation.places}, check=False)
    errors = [outcome.error for outcome in outcomes.values()]
    assert any(isinstance(error, HandshakeError) and "max_tokens" in str(error) for error in errors)
    assert all(isinstance(error, FederationError) for error in errors)


@pytest.mark.parametrize(
    ("make", "data", "said"),
    [
        (lambda: keras.layers.Discretization(num_bins=3), np.ones(3), "does not adapt over sites"),
        (lambda: keras.layers.Normalization(mean=0.0, variance=1.0), np.ones((3, 1)), "has mean= of its own"),
        (lambda: keras.layers.StringLookup(vocabulary=["a"]), np.array(["a"]), "has vocabulary= of its own"),
        (keras.layers.Normalization, iter([np.ones((3, 1))]), "can be run over once"),
        (keras.layers.Normalization, np.array([[np.nan]]), "NaN or infinite"),
        (keras.layers.StringLookup, np.array([], "<U1"), "no data"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Any], data: Any, said: str) -> None:
    with LocalFederation(sites=1) as federation:
        (outcome,) = federation.outcomes(
            {"site-1": lambda place: adapt(make(), data, kit=place.kit)}, check=False
        ).values()
    assert isinstance(outcome.error, ConfigError) and said in str(outcome.error)
