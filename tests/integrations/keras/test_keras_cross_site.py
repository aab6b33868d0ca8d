"""Cross-site evaluation by `model.evaluate`, which leaves no trace in what `fit` leaves."""

from __future__ import annotations

from typing import Any

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.state import to_host
from fl_adapters.testing import CrossSiteCase, LocalFederation, Trained, cross_site_cases
from fl_runtime.types import Arrays

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself


class Scored(m.Example):
    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        model, counter = m.compiled(m.classifier(seed=site), m.steady_adam(0.01)), m.Counter()
        m.fit(model, m.rows(site), FederatedCallback(**arguments), counter, epochs=epochs, validation_data=valid(site))
        return Trained(m.weights(model), counter.batches)

    def score(self, site: int, weights: Arrays) -> dict[str, float]:
        model = m.classifier()
        m.load(model, weights)
        x, y = valid(site)
        logits = to_host(model(x, training=False)).astype(np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
        return {"loss": float(losses.mean()), "accuracy": float((logits.argmax(axis=1) == y).mean())}


def valid(site: int) -> Any:
    return m.rows(200 + site, 10)


@pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
def test_the_callback_conforms(case: CrossSiteCase) -> None:
    case(Scored())


@pytest.mark.parametrize("best", [False, True])
def test_fit_leaves_the_same(best: bool, tmp_path: Any) -> None:
    def left(cross_site: bool) -> Any:
        with LocalFederation(sites=2, rounds=3, cross_site=cross_site, states=m.STATES) as federation:

            def site(place: Any) -> Any:
                model = m.compiled(m.classifier(seed=place.index))
                keeper = keras.callbacks.ModelCheckpoint(
                    str(tmp_path / f"{cross_site}-{best}-{place.name}.keras"), monitor="val_loss", save_best_only=True
                )
                stopper = keras.callbacks.EarlyStopping("val_loss", patience=9, mode="min", restore_best_weights=best)
                callbacks = [FederatedCallback(kit=place.kit), keeper, stopper]
                history = m.fit(model, m.rows(place.index), *callbacks, epochs=9, validation_data=valid(place.index))
                optimizer = [to_host(v) for v in model.optimizer.variables]
                rows = {k: v for k, v in history.history.items() if "seconds" not in k}
                return (rows, history.epoch, keeper.best, stopper.best), m.weights(model), optimizer

            found = federation.run(site)
            federation.result()
            final = federation.model("best" if best else "final")
        scores = [e.data["metrics"]["loss"] for e in federation.events if e.kind == "cross_score"]
        assert len(scores) == (4 if cross_site else 0)
        return found["site-1"], final

    (told, weights, optimizer), final = left(True)
    (told_alone, weights_alone, optimizer_alone), _ = left(False)
    assert told == told_alone
    assert all(weights[n].tobytes() == weights_alone[n].tobytes() for n in weights)
    assert all(weights[n].tobytes() == final[n].tobytes() for n in final)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(optimizer, optimizer_alone, strict=True))
