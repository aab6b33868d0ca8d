"""A script: one site trains on two devices (tf.distribute.MirroredStrategy) beside one that trains on one.

The mean over the 8 rows of a batch is the same on one device and on two. So both sites, under both policies, must end
with the weights of a federation whose sites have one device each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import keras
import keras_models as m
import tensorflow as tf

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits

CPU = tf.config.list_physical_devices("CPU")[0]


def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6,)), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(3)]
    return m.compiled(keras.Sequential(layers))


def federated(policy: str, every: str | int, mirrored: bool) -> tuple[dict[str, Any], list[int], float]:
    def train(place: Any) -> dict[str, Any]:
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope() if mirrored else tf.device("CPU:0")
        with scope:
            made = model()
        callback = FederatedCallback(kit=place.kit, every=every)
        m.fit(made, m.rows(place.index), callback, epochs=3, validation_data=m.rows(9, 20))
        return m.weights(made)

    with tempfile.TemporaryDirectory() as folder:
        with LocalFederation(sites=2, rounds=2, optimizer_state=policy, folder=Path(folder), states=[]) as federation:
            first, second = federation.run(train, timeout_s=600).values()
            require_same_bits(first, federation.model())
            require_same_bits(second, first)
            keras.saving.load_model(Path(folder) / "model" / "model.keras")
            score = federation.result().rounds[-1].metrics["loss"]
    return first, [e.data["num_examples"] for e in federation.events if e.kind == "update"], score


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 2)
    for policy, every in (("keep", 4), ("reset", "epoch"), ("average", "epoch")):
        (wanted, examples, score), (found, mirrored_examples, mirrored_score) = (
            federated(policy, every, mirrored) for mirrored in (False, True)
        )
        require_close(found, wanted, 1e-5)
        assert mirrored_examples == examples == [m.ROWS] * 4, mirrored_examples
        assert abs(mirrored_score - score) < 1e-5, (mirrored_score, score)
