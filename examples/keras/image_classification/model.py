"""Model of the example: a small convolutional network for any backend of Keras ($KERAS_BACKEND)."""

from __future__ import annotations

import keras


def network(shape: tuple[int, ...]) -> keras.Model:
    """Model from images of shape (side, side, 1) to scores of ten classes."""
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
