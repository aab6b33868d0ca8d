"""`fit` runs rounds x every, to the step, or says before the first step why it cannot."""

from __future__ import annotations

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_runtime.errors import ConfigError, FederationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

NO_SHUFFLE = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


def test_fit_is_shortened_in_the_middle_of_an_epoch() -> None:
    updates, begins = m.trained(settings={"rounds": 2, "every": 4}, epochs=50)
    assert begins == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [u.data["local_steps"] for u in updates] == [4, 4]


@pytest.mark.parametrize(("every", "epochs", "needed"), [("epoch", 2, 3), ("2 epochs", 5, 6), (4, 3, 4)])
def test_too_few_epochs_are_named_before_the_first_step(every, epochs, needed) -> None:
    with LocalFederation(sites=1, rounds=3, every=every) as federation:
        model, counter = m.compiled(m.classifier()), m.Counter()
        before = m.weights(model)
        with pytest.raises(ConfigError, match=f"take {needed} epochs(.|\n)*pass epochs={needed} to fit"):
            m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), counter, epochs=epochs)
    assert counter.batches == 0
    assert all(np.array_equal(before[name], value) for name, value in m.weights(model).items())


def test_epochs_are_counted_from_initial_epoch() -> None:
    with LocalFederation(sites=1, rounds=3) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit)
        with pytest.raises(ConfigError, match="pass epochs=5 to fit"):
            m.fit(m.compiled(m.classifier()), m.rows(0), callback, epochs=4, initial_epoch=2)
    updates, begins = m.trained(settings={"rounds": 3}, epochs=9, initial_epoch=2)
    assert len(updates) == 3 and len(begins) == 9


@pytest.mark.parametrize(("every", "rounds"), [("2 epochs", 3), (4, 4)])
def test_fits_own_budget_decides_and_its_last_round_may_be_shorter(every, rounds) -> None:
    updates, begins = m.trained(settings={}, arguments={"every": every}, epochs=5)
    assert len(updates) == rounds and len(begins) == 15
    assert sum(u.data["local_steps"] for u in updates) == 15


def test_a_step_is_the_optimizers_where_gradients_accumulate() -> None:
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    updates, begins = m.trained(settings={"rounds": 2, "every": 2}, optimizer=optimizer, epochs=9)
    assert begins == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [u.data["local_steps"] for u in updates] == [2, 2]


def endless(batches: int | None = None):
    x, y = m.rows(0)
    made = 0
    while batches is None or made < batches:
        yield x[: m.BATCH], y[: m.BATCH]
        made += 1


def from_generator(arguments, *, batches=None, settings=None, **options):
    with LocalFederation(sites=1, **(settings or {"rounds": 2})) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit, **arguments)
        model = m.compiled(m.classifier())
        model.fit(endless(batches), callbacks=[callback], verbose=0, **options)
        federation.result()
    return [(e.data["num_examples"], e.data["local_steps"]) for e in federation.events if e.kind == "update"]


@NO_SHUFFLE
def test_examples_seen_are_counted_where_the_data_has_no_length() -> None:
    assert from_generator({}, steps_per_epoch=3, epochs=5) == [(12, 3), (12, 3)]
    assert from_generator({"every": "2 epochs"}, steps_per_epoch=3, epochs=5) == [(12, 6), (12, 6)]
    assert from_generator({"every": 2}, steps_per_epoch=3, epochs=5) == [(8, 2), (8, 2)]
    assert from_generator({"num_examples": 77}, steps_per_epoch=3, epochs=5) == [(77, 3), (77, 3)]


@NO_SHUFFLE
def test_data_without_a_length_needs_the_number_of_rounds() -> None:
    assert from_generator({"every": 2}, epochs=1) == [(8, 2), (8, 2)]
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        from_generator({"every": 2}, settings={"min_sites": 1}, epochs=1)


@NO_SHUFFLE
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_that_runs_out_is_an_error_that_says_so() -> None:
    with pytest.raises(FederationError, match="pass more epochs than 1"):
        from_generator({"every": 5}, batches=8, epochs=1)


def test_a_schedule_that_ends_before_the_run_is_named() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=5)
    with pytest.warns(UserWarning, match="ends after 5 of the 6 optimizer steps"):
        m.trained(settings={"rounds": 2}, optimizer=keras.optimizers.Adam(schedule), epochs=9)


def test_one_schedule_spans_all_rounds() -> None:
    rates = []

    def rate(callback, epoch, logs) -> None:
        rates.append(float(keras.ops.convert_to_numpy(callback.model.optimizer.learning_rate)))

    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=m.BATCHES, decay_rate=0.5)
    with LocalFederation(sites=1, rounds=3, optimizer_state="average") as federation:
        model = m.compiled(m.classifier(), keras.optimizers.Adam(schedule))
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), m.At(rate), epochs=9)
    assert rates == pytest.approx([0.05, 0.025, 0.0125])
