"""A full, missing or damaged disk, and a clock that jumps: a clear error, and acknowledged updates stay."""

from __future__ import annotations

import itertools
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from federation_bench import WAIT_S, registered, serving, settings

from fl_runtime.errors import StoreError
from fl_runtime.server import Server
from fl_runtime.types import Arrays

W: Arrays = {"w": np.zeros(300_000)}  # more than travels in one message


def value(number: float) -> Arrays:
    return {"w": np.full(300_000, float(number))}


def test_a_store_that_fails_halts_the_run_until_the_server_is_started_again(tmp_path: Path) -> None:
    blobs, away = tmp_path / "server" / "blobs", tmp_path / "away"
    with serving(tmp_path, 2, rounds=1) as bench:
        sites, tasks = bench.started(W)
        assert sites["site-1"].submit(tasks["site-1"], value(2)) == "used"
        blobs.rename(away)
        impatient = bench.site("site-2", patience_s=0.3)

        def joined_and_submitted() -> None:  # the sum of the first update may have met the disk already
            impatient.join()
            impatient.register(W)
            impatient.submit(tasks["site-2"], value(4))

        with pytest.raises(StoreError, match="cannot write.*gave up after 0.3 s") as caught:
            joined_and_submitted()
        assert str(blobs) in caught.value.where
        assert "free disk space" in caught.value.fix
        assert bench.server.wait(WAIT_S)
        assert isinstance(bench.server.result().error, StoreError)
    away.rename(blobs)
    with serving(tmp_path, 2, rounds=1) as bench:
        back = [bench.site(name) for name in bench.names]
        registered(back, W)
        task = back[1].client.next_task()
        assert (task.kind, task.round) == ("train", 1)
        assert back[1].submit(task, value(4)) == "used"
        assert back[0].client.next_task().arrays["w"][0] == 3.0


def run_with_an_update(folder: Path) -> None:
    """Stop a run in its second round, with one site's update in it."""
    with serving(folder, 2, rounds=2, sockets=False) as bench:
        sites, tasks = bench.started(W)
        for name, site in sites.items():
            site.submit(tasks[name], value(1))
        tasks = {name: site.client.next_task() for name, site in sites.items()}
        sites["site-1"].submit(tasks["site-1"], value(2))


def again(folder: Path) -> Server:
    return Server(settings(2, rounds=2), folder, {})


@pytest.mark.parametrize("blob", ["model-1", "update-2-0"])
def test_a_blob_that_is_not_what_was_written_is_refused_by_name(tmp_path: Path, blob: str) -> None:
    run_with_an_update(tmp_path)
    path = tmp_path / "server" / "blobs" / f"{blob}.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="on disk is not what was written") as caught:
        again(tmp_path)
    assert caught.value.where == str(path)
    assert "copy" in caught.value.fix


@pytest.mark.parametrize("damage", ["torn", "a page", "an update's weight", "no JSON", "another layout"])
def test_a_damaged_journal_is_refused(tmp_path: Path, damage: str) -> None:
    run_with_an_update(tmp_path)
    path = tmp_path / "server" / "journal.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "an update's weight":
            assert db.execute("UPDATE update_ SET header=replace(header, '\"num_examples\": 1', '\"num_examples\": 7')")
        elif damage == "no JSON":
            db.execute("UPDATE round SET participants='[\"site-1' WHERE round=2")
        elif damage == "another layout":
            db.execute("UPDATE layout SET manifest=x'0a050a0161120161'")
    db.close()
    if damage in ("torn", "a page"):
        content = path.read_bytes()
        end = len(content) // 2
        path.write_bytes(content[:end] if damage == "torn" else content[:end] + b"\xa5" * (len(content) - end))
    with pytest.raises(StoreError, match="journal") as caught:
        again(tmp_path)
    assert str(path) in caught.value.where
    assert caught.value.fix


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines use the monotonic clock: a jump of a day either way ends no round and loses no site."""
    day, now = 86_400.0, time.time()
    jumps = itertools.count()
    monkeypatch.setattr(time, "time", lambda: now + day * (-1) ** next(jumps))
    with serving(tmp_path, 2, sockets=False, rounds=3, deadline_s=600.0, rejoin_s=60.0) as bench:
        finals = bench.run(
            lambda name: bench.site(name).take_part(W, lambda task: {"w": task.arrays["w"] + int(name[-1])})
        )
    assert {final["w"][0] for final in finals.values()} == {4.5}
    assert all(result.sites == bench.names and 0 <= result.seconds < 60 for result in bench.server.result().rounds)
