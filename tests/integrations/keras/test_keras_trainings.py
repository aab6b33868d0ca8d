"""Cross-validation and grid search with Keras: each fit of a script is a federated training of its own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_models import STATES, compiled, fit, rows

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation, Place

pytest.importorskip("sklearn")

from sklearn.model_selection import GridSearchCV, KFold

FOLDS, EPOCHS, ROWS = 3, 2, 24


def model(width: int = 5) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.Input((6,)), keras.layers.Dense(width, activation="tanh"), keras.layers.Dense(3)]
    return compiled(keras.Sequential(layers), keras.optimizers.SGD(0.1))


def folds(index: int) -> list[tuple[Any, Any]]:
    """The training rows of each fold at a site, as (x, y)."""
    x, y = rows(index, ROWS)
    return [(x[kept], y[kept]) for kept, _ in KFold(FOLDS).split(x)]


def by_hand(fold: int) -> list[Any]:
    """Both sites' models of a fold, averaged after each epoch without a federation."""
    models = [model(), model()]
    for _ in range(EPOCHS):
        for index, site in enumerate(models):
            fit(site, folds(index)[fold])
        means = [np.mean(pair, axis=0) for pair in zip(*(site.get_weights() for site in models), strict=True)]
        for site in models:
            site.set_weights(means)
    return models[0].get_weights()


def test_k_folds_equal_plain_loops() -> None:
    def site(place: Place) -> list[Any]:
        trained = []
        for data in folds(place.index):
            trained.append(model())
            fit(trained[-1], data, FederatedCallback(kit=place.kit), epochs=EPOCHS)
        return [item.get_weights() for item in trained]

    with LocalFederation(sites=2, states=STATES) as federation:
        weights = federation.run(site)
        federation.result()
        assert federation.server.training_count == FOLDS
    for fold in range(FOLDS):
        for got, want in zip(weights["site-1"][fold], by_hand(fold), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)
        for first, second in zip(weights["site-1"][fold], weights["site-2"][fold], strict=True):
            np.testing.assert_array_equal(first, second)


def test_grid_search_over_a_keras_estimator() -> None:
    """Sites with the same rows learn what one of them learns alone, fit by fit, the last one on all rows included."""
    if not hasattr(keras, "wrappers"):
        pytest.skip("keras.wrappers came with Keras 3.7")
    x, y = rows(0, ROWS)

    def search(*callbacks: Any) -> Any:
        def build(X: Any, y: Any, width: int) -> keras.Model:  # noqa: N803 (the names that Keras passes)
            layers = [keras.Input((6,)), keras.layers.Dense(width, activation="tanh"), keras.layers.Dense(3)]
            keras.utils.set_random_seed(3)
            made = keras.Sequential([*layers, keras.layers.Softmax()])
            made.compile(optimizer=keras.optimizers.SGD(0.1), loss="categorical_crossentropy")
            return made

        estimator = keras.wrappers.SKLearnClassifier(model=build, model_kwargs={"width": 3})
        grid = {"model_kwargs": [{"width": 3}, {"width": 5}]}
        found = GridSearchCV(estimator, grid, cv=KFold(FOLDS), scoring="accuracy", error_score="raise")
        # as arguments of fit: sklearn's clones lose the estimator's `fit_kwargs` (Keras 3.15.1)
        return found.fit(x, y, batch_size=4, shuffle=False, verbose=0, epochs=EPOCHS, callbacks=list(callbacks))

    with LocalFederation(sites=2, states=STATES) as federation:
        searches = federation.run(lambda place: search(FederatedCallback(kit=place.kit)))
        federation.result()
        assert federation.server.training_count == 2 * FOLDS + 1
    alone = search()
    for found in searches.values():
        np.testing.assert_allclose(found.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
        for got, want in zip(
            found.best_estimator_.model_.get_weights(), alone.best_estimator_.model_.get_weights(), strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-6)
