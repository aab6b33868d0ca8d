"""`load()`: the Keras model of a run, as it is and in a model that is built already."""

from __future__ import annotations

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_same_bits
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.store.tensorfile import write_tensors


def test_a_model_opens_by_itself_and_in_one_that_is_built() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        model = m.compiled(m.classifier())
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=1)
        federation.result()
        probe = m.rows(9, 8)[0]
        wanted, arrays = model.predict(probe, verbose=0), m.KerasState(model).get_state()
        for opened in (federation.load(), federation.load(into=m.classifier(seed=7))):
            np.testing.assert_array_equal(opened.predict(probe, verbose=0), wanted)
        with pytest.raises(StateMismatchError, match="does not fit"):
            federation.load(m.classifier(width=6))
        (federation.folder / "model" / "model.keras").unlink()  # as a server without Keras keeps it
        write_tensors(federation.folder / "model" / "model.safetensors", arrays)
        mine = m.classifier(seed=7)
        require_same_bits(m.weights(federation.load(mine)), m.weights(model))
        with pytest.raises(StateMismatchError, match="does not fit"):
            federation.load(m.classifier(width=6))


class Doubling(keras.layers.Layer):
    """A layer that Keras does not know by name."""

    def call(self, inputs):
        return 2 * inputs


def test_a_layer_that_is_not_registered_is_named() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        model = m.compiled(keras.Sequential([keras.Input((6,)), Doubling(), keras.layers.Dense(3)]))
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), epochs=1)
        federation.result()
        with pytest.raises(ConfigError, match=r"Doubling(.|\n)*register_keras_serializable"):
            federation.load()
