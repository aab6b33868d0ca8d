"""Durability "power": data is on the device before anybody is told that it is stored."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from federation_bench import serving

from fl_runtime.store.journal import Journal
from fl_runtime.types import Arrays

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads which file a descriptor is of")

W: Arrays = {"w": np.zeros(300_000)}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files and folders that have been synchronised, in order."""
    names: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_an_update_is_on_the_device_before_the_journal_speaks_of_it(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, list[str]] = {}

    def noting(name: str) -> None:
        original = getattr(Journal, name)

        def note(self: Journal, *args: object, **kwargs: object) -> None:
            before.setdefault(name, list(synced))
            original(self, *args, **kwargs)

        monkeypatch.setattr(Journal, name, note)

    noting("accepted")
    noting("committed")
    with serving(tmp_path, 1, rounds=1, durability="power") as bench:
        final = bench.site("site-1").take_part(W, lambda task: {"w": task.arrays["w"] + 1})
        assert before["committed"][-2:] == ["model-0.safetensors", "blobs"]
        assert before["accepted"][-2:] == ["update-1-0.safetensors", "blobs"]
        assert synced[-2:] == ["model-1.safetensors", "blobs"]
        synced.clear()
        bench.server.export(tmp_path / "model")
        assert synced == ["model.safetensors.partial", "model"]
        with sqlite3.connect(tmp_path / "server" / "journal.sqlite") as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert final["w"][0] == 1.0


def test_every_commit_of_a_durable_journal_waits_for_the_disk(tmp_path: Path) -> None:
    for durable, level in ((True, 2), (False, 0)):
        journal = Journal.in_file(tmp_path / f"{durable}.sqlite", durable=durable)
        assert journal._db.rows("PRAGMA synchronous")[0] == (level,)
        journal.close()


def test_by_default_nobody_waits_for_the_disk(tmp_path: Path, synced: list[str]) -> None:
    with serving(tmp_path, 1, rounds=2) as bench:
        bench.site("site-1").take_part(W, lambda task: dict(task.arrays))
        bench.server.export(tmp_path / "model")
    assert synced == []
