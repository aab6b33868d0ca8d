"""Classes of the training data are compared between the sites before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_runtime.errors import HandshakeError


def images(folder: Path, *classes: str) -> Any:
    """A data set of a folder of images for each class, with transformations as a script adds them."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            keras.utils.save_img(folder / name / f"{i}.png", np.random.default_rng(i).random((8, 8, 3)))
    data = keras.utils.image_dataset_from_directory(folder, image_size=(8, 8), batch_size=4, verbose=False)
    return data.map(lambda x, y: (x / 255, y)).prefetch(1)


def test_a_folder_that_one_site_lacks_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    data = [images(tmp_path / "one", "cat", "dog", "fox"), images(tmp_path / "two", "cat", "fox")]

    def train(place: Any) -> None:
        layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
        model = m.compiled(keras.Sequential(layers))
        model.fit(data[place.index], verbose=0, callbacks=[FederatedCallback(kit=place.kit)])

    with LocalFederation(sites=2, rounds=1, states=m.STATES) as federation:
        with pytest.raises(
            HandshakeError, match="classes of the training data: 3 entries != 2 entries; 1: 'dog' != 'fox'"
        ):
            federation.run(train)
        assert not [event for event in federation.events if event.kind == "round_started"]
