"""How far a site is within a round: the batches of `fit`, on the screen."""

from __future__ import annotations

from typing import Any

import keras
import keras_models as m
from shown_steps import row_of, wait_for_steps

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation


def test_the_screen_shows_how_many_batches_of_the_round_are_trained() -> None:
    trained = 0
    with LocalFederation(sites=1, rounds=2, every=6) as federation:

        def watch(batch: int, logs: Any) -> None:
            nonlocal trained
            trained += 1
            if trained in (4, 8):  # in the second epoch of round 1, and in round 2
                wait_for_steps(federation, "site-1", {4: 4, 8: 2}[trained])

        log = keras.callbacks.LambdaCallback(on_train_batch_end=watch)
        m.fit(m.compiled(m.classifier()), m.rows(0), FederatedCallback(kit=federation.places[0].kit), log, epochs=9)
        federation.result()
        events = federation.events

    assert trained == 12
    for done in (4, 2):
        row = row_of(events, "site-1", done)
        assert row[1] == "training" and f"{done}/6" in row
