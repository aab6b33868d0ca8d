"""The journal: what it holds after a restart, whom it belongs to, and which versions it reads."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fl_runtime.errors import ConfigError, NewerFormatError, QuorumError, StoreError
from fl_runtime.store.journal import SCHEMA_VERSION, Journal
from fl_runtime.store.journal_entries import ModelEntry, UpdateEntry
from fl_runtime.types import RunSettings
from fl_runtime.wire.manifest import Manifest

SETTINGS = RunSettings("job", ("a", "b"), 2, rounds=3, keep_local=("head.*",), exchange=("body.*",))
MANIFEST = Manifest.of({"w": np.zeros(3)}, {"m": np.zeros(1, np.float32)})


def reopened(journal: Journal, path: Path) -> Journal:
    journal.close()
    again = Journal.in_file(path)
    again.begin(SETTINGS)
    return again


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Journal:
    journal = Journal.in_file(path)
    journal.begin(SETTINGS)
    journal.layout(MANIFEST)
    return journal


def update(number: int, site: str) -> UpdateEntry:
    return UpdateEntry(number, site, b"digest", f"update-{number}-{site}", MANIFEST.layout, {"round": number})


def test_all_that_was_written_is_there_after_a_restart(journal: Journal, path: Path) -> None:
    journal.joined("a", 1)
    journal.registered("a", {"rounds": 3})
    journal.joined("b", 1)
    journal.joined("a", 2)
    journal.agreed(3)
    journal.committed(ModelEntry(0, "model-0", MANIFEST.layout, b"0"), 0, {})
    journal.round_opened(1, ("a", "b"), 12.5)
    journal.accepted(update(1, "b"))
    journal.scored(0, "a", {"loss": 0.1}, 7)
    again = reopened(journal, path)
    assert list(again.reader.sites()) == [("a", 2, {"rounds": 3}), ("b", 1, None)]
    assert again.reader.rounds() == 3
    assert again.reader.manifest(MANIFEST.layout) == MANIFEST
    assert again.reader.models() == [ModelEntry(0, "model-0", MANIFEST.layout, b"0")]
    (entry,) = again.reader.round_entries()
    assert (entry.round, entry.participants, entry.opened_at, entry.result) == (1, ("a", "b"), 12.5, None)
    assert again.reader.updates(1) == [update(1, "b")]
    assert list(again.reader.scores()) == [(0, "a", {"loss": 0.1}, 7)]


def test_closing_a_round_replaces_its_updates_by_its_result(journal: Journal, path: Path) -> None:
    journal.round_opened(1, ("a",), 1.0)
    journal.accepted(update(1, "a"))
    journal.committed(ModelEntry(1, "model-1", MANIFEST.layout, b"1"), 1, {"seconds": 2.0})
    again = reopened(journal, path)
    assert again.reader.round_entries()[0].result == {"seconds": 2.0}
    assert [m.version for m in again.reader.models()] == [1]
    again.forget_model(1)
    assert again.reader.models() == []


def test_a_transaction_that_fails_leaves_nothing_behind(journal: Journal) -> None:
    journal.round_opened(1, ("a",), 1.0)
    entry = ModelEntry(1, "model-1", MANIFEST.layout, b"1")
    journal.committed(entry, 1, {"seconds": 2.0})
    journal.round_opened(2, ("a",), 1.0)
    with pytest.raises(StoreError):
        journal.committed(entry, 2, {"seconds": 3.0})  # the same model version twice
    assert journal.reader.round_entries()[1].result is None


def test_another_job_or_other_settings_are_refused(journal: Journal, path: Path) -> None:
    for other in (replace(SETTINGS, name="other"), replace(SETTINGS, rounds=4)):
        again = Journal.in_file(path)
        with pytest.raises(ConfigError, match="'job'") as caught:
            again.begin(other)
        assert caught.value.where == str(path)
        assert caught.value.fix
    Journal.in_file(path).begin(SETTINGS)


def test_a_journal_from_before_a_setting_was_known_goes_on(journal: Journal, path: Path) -> None:
    journal.close()
    with sqlite3.connect(path) as db:
        (text,) = db.execute("SELECT value FROM meta WHERE key='job'").fetchone()
        fields = json.loads(text)
        del fields["durability"], fields["cross_site"]
        db.execute("UPDATE meta SET value=? WHERE key='job'", (json.dumps(fields),))
    Journal.in_file(path).begin(SETTINGS)
    with pytest.raises(ConfigError):
        Journal.in_file(path).begin(replace(SETTINGS, durability="power"))


def test_a_newer_schema_is_refused_with_the_upgrade_to_make(journal: Journal, path: Path) -> None:
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value=? WHERE key='schema_version'", (str(SCHEMA_VERSION + 1),))
    with pytest.raises(NewerFormatError, match=f"the journal has format {SCHEMA_VERSION + 1}") as caught:
        Journal.in_file(path)
    assert "install fl-adapters" in caught.value.fix


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Journal.in_file(path).begin(SETTINGS)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_the_end_of_a_run_is_recorded_with_its_error(journal: Journal, path: Path) -> None:
    journal.ended(QuorumError("too few"))
    journal.close()
    with sqlite3.connect(path) as db:
        (value,) = db.execute("SELECT value FROM meta WHERE key='ended'").fetchone()
    assert "quorum" in value


def test_a_layout_that_was_never_recorded_is_a_store_error(journal: Journal) -> None:
    with pytest.raises(StoreError, match="layout"):
        journal.reader.manifest(b"unknown")
