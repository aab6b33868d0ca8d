"""Life in a user's process: cells run twice, copies, interruptions and backups."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from pathlib import Path

import keras
import keras_models as m
import pytest

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_same_bits
from fl_runtime.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

TENSORBOARD = keras.backend.backend() == "tensorflow" and find_spec("tensorboard")


def joined(federation: LocalFederation, site: str = "site-1") -> list[int]:
    return [e.data["attempt"] for e in federation.events if e.kind == "joined" and e.site == site]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_a_copy_takes_the_place_of_the_callback(duplicate) -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        callback = duplicate(FederatedCallback(kit=federation.places[0].kit))
        m.fit(m.compiled(m.classifier()), m.rows(0), callback, epochs=2)
        assert len(federation.result().rounds) == 2


def test_copies_made_in_the_middle_of_a_run_hold_nothing_of_it() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit)
        sizes = []
        watch = m.At(lambda *_: sizes.append(len(pickle.dumps(copy.deepcopy(callback)))))
        m.fit(m.compiled(m.classifier()), m.rows(0), callback, watch, epochs=1)
        assert sizes[0] < 2_000


def test_a_cell_run_twice_joins_again_and_takes_the_rounds_that_are_left() -> None:
    class Interrupted(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            if self.model.optimizer.iterations >= 4:  # in round 2
                raise KeyboardInterrupt

    with LocalFederation(sites=1, rounds=3) as federation:
        kit = federation.places[0].kit
        with pytest.raises(KeyboardInterrupt):
            m.cell(kit, Interrupted())
        counter = m.Counter()
        with pytest.warns(UserWarning, match="rejoins in round 2 with a new optimizer state"):
            m.cell(kit, counter)
        assert len(federation.result().rounds) == 3
    assert joined(federation) == [1, 2] and counter.batches == 2 * m.BATCHES


def test_a_finished_cell_run_again_trains_again() -> None:
    with LocalFederation(sites=2, rounds=2, states=m.STATES) as federation:
        cells = federation.run(lambda place: [m.weights(m.cell(place.kit)) for _ in range(2)])
        models = [federation.model(training=number) for number in (1, 2)]
    for number, model in enumerate(models):
        for trained in cells.values():
            require_same_bits(trained[number], model)


def test_a_backup_of_another_run_is_refused() -> None:
    def backed_up(name: str, *callbacks):
        with LocalFederation(sites=1, rounds=2, name=name) as federation:
            backup = keras.callbacks.BackupAndRestore(str(Path("backup").absolute()), delete_checkpoint=False)
            m.cell(federation.places[0].kit, backup, *callbacks, epochs=9)

    backed_up("first")
    with pytest.raises(ConfigError, match="made after 2 epochs, but the federation is in round 1"):
        backed_up("second")


def test_alone_the_callback_stays_out_of_the_way(capfd) -> None:
    checkpoint, log = keras.callbacks.ModelCheckpoint("a.keras"), keras.callbacks.CSVLogger("log.csv")
    model, callback = m.compiled(m.classifier()), FederatedCallback()
    history = m.fit(model, m.rows(0), checkpoint, log, callback, epochs=2, validation_data=m.rows(9))
    assert checkpoint.filepath == "a.keras" and Path("log.csv").exists()
    assert not any("federation" in name for name in history.history)
    assert len([line for line in capfd.readouterr().err.splitlines() if "fl-adapters" in line]) <= 1
    with pytest.raises(ConfigError, match="required=True"):
        m.fit(model, m.rows(0), FederatedCallback(required=True))


def test_output_folders_of_sites_on_one_machine_are_kept_apart() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        place = federation.places[0]
        own = federation.folder / "sites" / place.name
        board = keras.callbacks.TensorBoard("board") if TENSORBOARD else None
        callbacks = [
            keras.callbacks.CSVLogger("log.csv"),
            keras.callbacks.BackupAndRestore("back", delete_checkpoint=False),
        ]
        callbacks += [board] if board else []
        m.fit(m.compiled(m.classifier()), m.rows(0), *callbacks, FederatedCallback(kit=place.kit), epochs=1)
        assert (own / "log.csv").read_text().count("\n") == 2
        assert (own / "back" / "latest.weights.h5").exists() and not Path("back").exists()
        assert not board or list((own / "board").rglob("events*"))


def test_a_list_of_callbacks_made_before_fit() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        model, counter = m.compiled(m.classifier()), m.Counter()
        mine = [counter, FederatedCallback(kit=federation.places[0].kit)]
        made = keras.callbacks.CallbackList(mine, add_history=True, model=model, epochs=9, steps=m.BATCHES)
        model.fit(*m.rows(0), batch_size=m.BATCH, epochs=9, verbose=0, callbacks=made)
        assert len(federation.result().rounds) == 2 and counter.batches == 2 * m.BATCHES


def test_evaluating_with_the_callback_is_no_part_of_a_run() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        callback = FederatedCallback(kit=federation.places[0].kit)
        model = m.compiled(m.classifier())
        m.fit(model, m.rows(0), callback, epochs=1)
        model.evaluate(*m.rows(0), callbacks=[callback], verbose=0)
    assert joined(federation) == [1]
