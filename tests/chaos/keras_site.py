"""A small model under Keras' `fit`, for the chaos suite; on PyTorch unless $KERAS_BACKEND names another backend.

It has Adam, a falling learning rate, dropout, shuffling, and batch statistics that stay at the site.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from site_notes import acknowledged, final

from fl_adapters import site
from fl_adapters.keras import FederatedCallback

ROWS, COLUMNS, WIDTH = 32, 64, 256


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(ROWS, COLUMNS)).astype("float32")
    return x, (x[:, 0] + x[:, 1] > 0).astype("int32")


def main() -> None:
    keras.utils.set_random_seed(site().index)
    model = keras.Sequential(
        [
            keras.Input((COLUMNS,)),
            keras.layers.Dense(WIDTH, activation="relu", name="body"),
            keras.layers.BatchNormalization(name="statistics"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(2, name="head"),
        ],
        name="model",
    )
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callbacks = [
        FederatedCallback(keep_local=["statistics/*"]),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.01 * 0.97**epoch),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: acknowledged(epoch + 1)),
    ]
    data, validation = rows(site().index), rows(99)
    model.fit(*data, batch_size=4, epochs=100, verbose=0, validation_data=validation, callbacks=callbacks)
    exchanged = [variable for variable in model.weights if "statistics" not in variable.path]
    final({variable.path.removeprefix("model/"): keras.ops.convert_to_numpy(variable.value) for variable in exchanged})


if __name__ == "__main__":
    main()
