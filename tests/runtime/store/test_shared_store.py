"""The store of several servers, on a real PostgreSQL: what a lease lets its holder write, and what it keeps out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from postgres import database, postgres
from two_servers import shared_place

psycopg = pytest.importorskip("psycopg")

from fl_runtime.errors import ConfigError, StoreError  # noqa: E402
from fl_runtime.server.records.history import event_line  # noqa: E402
from fl_runtime.store.copies import SharedPlace  # noqa: E402
from fl_runtime.store.journal import Journal  # noqa: E402
from fl_runtime.store.journal_entries import ModelEntry, StrategyStateEntry, UpdateEntry  # noqa: E402
from fl_runtime.store.lease import Lease  # noqa: E402
from fl_runtime.store.shared import SharedStore  # noqa: E402
from fl_runtime.types import Event, RunSettings  # noqa: E402
from fl_runtime.wire.manifest import Manifest, TensorSpec  # noqa: E402

SETTINGS = RunSettings(name="test", sites=("north", "south"), min_sites=2, rounds=3)
MANIFEST = Manifest((TensorSpec("w", "float32", (3,)),))


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture
def url(server_url: str) -> Iterator[str]:
    with database(server_url, "store") as made:
        yield made


class Host:
    """One of the machines: its lease, and the store that it has while it holds that."""

    def __init__(self, url: str, folder: Path, name: str) -> None:
        self.root = folder / name
        self.lease = Lease(url, "study", name)
        self._place = shared_place(folder)
        self._things = ExitStack()

    def serve(self) -> SharedStore:
        assert self.lease.acquire(lambda _: True)
        return self.serve_on()

    def serve_on(self) -> SharedStore:
        """Open the store with a lease that is held."""
        self.store = SharedStore(self.lease, SharedPlace(self._place), self.root, event_line)
        self._things.callback(self.store.close)
        self.store.restore()
        return self.store

    def expire(self, url: str) -> None:
        """Let the lease end, as if this machine had stood still."""
        with psycopg.connect(url, autocommit=True, options="-c statement_timeout=20000") as connection:
            connection.execute("UPDATE fl_adapters.lease SET until = '-infinity'")

    def close(self) -> None:
        self._things.close()
        self.lease.close()


@pytest.fixture
def hosts(url: str, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with closing(Host(url, tmp_path, "one")) as one, closing(Host(url, tmp_path, "two")) as two:
        yield one, two


def test_a_machine_that_stands_still_within_a_transaction_keeps_nobody_out(
    hosts: tuple[Host, Host], url: str, tmp_path: Path
) -> None:
    one, two = hosts
    journal = one.serve().journal(tmp_path / "one" / "run")

    def stand_still() -> None:
        with journal._db.transaction():
            journal._db.put("over", "true")
            one.lease._closed.set()  # its thread stands still, too
            one.expire(url)
            assert two.lease.acquire(lambda _: False)

    with pytest.raises(StoreError):
        stand_still()
    with closing(two.serve_on().journal(tmp_path / "two" / "run")) as kept:
        assert kept._db.get("over") is None
    journal.close()


def _written(journal: Journal) -> None:
    """Make every kind of entry, some of them twice."""
    journal.begin(SETTINGS)
    journal.layout(MANIFEST)
    journal.layout(MANIFEST)
    for attempt in (1, 2):
        journal.joined("north", attempt)
    journal.registered("north", {"tensors": 1})
    journal.joined("south", 1)
    journal.agreed(3)
    journal.round_opened(0, ("north",), 1.0)
    journal.committed(ModelEntry(0, "model-0", MANIFEST.layout, b"12345678"), 0, {"seconds": 1.0})
    for at in (2.0, 3.5):
        journal.round_opened(1, ("north", "south"), at)
    for digest in (b"a" * 16, b"b" * 16):
        journal.accepted(UpdateEntry(1, "north", digest, "update", MANIFEST.layout, {"round": 1, "metrics": {"ä": 1}}))
    for loss in (0.5, 0.25):
        journal.scored(0, "south", {"loss": loss}, 7)
    journal.left("south", True)
    journal.lost("north", True)
    state = StrategyStateEntry("kept-1", MANIFEST.layout)
    journal.committed(ModelEntry(1, "model-1", MANIFEST.layout, b"87654321"), 1, {"seconds": 2.0}, state)
    journal.buffered(UpdateEntry(2, "south", b"c" * 16, "late", MANIFEST.layout, {"round": 2}))
    journal.forget_model(0)
    journal.round_opened(3, ("north",), 4.0)
    journal.round_dropped(3, 1, ("north",))


def _read(journal: Journal) -> list[object]:
    reader = journal.reader
    return [
        sorted(reader.sites()), reader.rounds(), reader.terms(), reader.models(), reader.strategy_state(),
        reader.round_entries(), reader.last_updates(), reader.buffer(), sorted(reader.scores(), key=str),
        reader.who_left(), reader.who_is_lost(), reader.manifest(MANIFEST.layout), reader.finished(),
        journal.failures.tries(3), journal.failures.blamed(3), journal.failures.suspects(),
    ]  # fmt: skip


def test_a_journal_holds_in_postgresql_what_it_holds_in_sqlite(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    one, two = hosts
    local = Journal.in_file(tmp_path / "journal.sqlite")
    _written(local)
    store = one.serve()
    folder = one.root / "job" / "server"
    assert not store.holds(folder)
    with closing(store.journal(folder)) as shared:
        _written(shared)
        assert _read(shared) == _read(local)
    one.close()
    again = two.serve()
    assert again.holds(two.root / "job" / "server")
    with closing(again.journal(two.root / "job" / "server")) as shared:
        assert _read(shared) == _read(local)
        with pytest.raises(ConfigError, match="another run"):
            shared.begin(replace(SETTINGS, rounds=4))


def test_an_old_leader_that_wakes_up_can_write_nothing(hosts: tuple[Host, Host], url: str) -> None:
    one, two = hosts
    old = one.serve()
    folder, new_folder = one.root / "job" / "server", two.root / "job" / "server"
    journal, blobs = old.journal(folder), old.blobs(folder)
    journal.begin(SETTINGS)
    blob = blobs.create("model-1", MANIFEST)
    blob.buffer[:] = 1
    blobs.settle(blob)
    old.keep(one.root / "job" / "job.json", b"running")
    on_record = blob.name
    one.expire(url)
    new = two.serve()
    assert two.lease.epoch == one.lease.epoch + 1
    taken = new.blobs(new_folder)
    assert taken.open(on_record, MANIFEST).buffer.tolist() == [1] * 12

    writes = [
        lambda: journal.joined("north", 1),
        lambda: journal.agreed(9),
        lambda: journal.ended(None),
        lambda: old.keep(one.root / "job" / "job.json", b"finished"),
        lambda: old.remove(one.root / "job" / "job.json"),
        lambda: old.forget(one.root / "job"),
        lambda: old.journal(one.root / "other" / "server"),
    ]
    for write in writes:
        with pytest.raises(StoreError, match="another server has taken over"):
            write()
    assert not one.lease.held
    assert one.lease.reason.startswith("another server has taken over")
    # its tensors: new ones do not replace the leader's, and what it deletes stays
    other = blobs.create("model-1", MANIFEST)
    other.buffer[:] = 9
    blobs.settle(other)
    blobs.free(blob)
    blobs.sweep(set())
    old.recorder(one.root / "job")(Event("finished", 0.0, 0, "", {}))  # type: ignore[misc]
    assert new.blobs(new_folder).open(on_record, MANIFEST).buffer.tolist() == [1] * 12
    two.store.restore()
    assert (two.root / "job" / "job.json").read_bytes() == b"running"
    new.recorder(two.root / "job")
    assert (two.root / "job" / "events.jsonl").read_text() == ""
    assert list(new.journal(new_folder).reader.sites()) == []


def test_taking_over_waits_for_a_transaction_that_is_under_way(hosts: tuple[Host, Host], url: str) -> None:
    one, two = hosts
    journal = one.serve().journal(one.root / "job" / "server")
    journal.begin(SETTINGS)
    journal.joined("north", 1)
    one.expire(url)
    taken = threading.Event()

    def take() -> None:
        two.serve()
        taken.set()

    with journal._db.transaction():
        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        assert not taken.wait(0.3)
        journal._db.run("UPDATE site SET attempt=2")
    thread.join(10)
    assert taken.is_set()
    assert [site[1] for site in two.store.journal(two.root / "job" / "server").reader.sites()] == [2]


def test_one_server_at_a_time_and_the_next_at_once_when_it_is_handed_back(hosts: tuple[Host, Host]) -> None:
    one, two = hosts
    one.serve()
    assert not two.lease.acquire(lambda _: True)
    assert two.lease.holder() == "one"
    one.close()
    assert two.lease.acquire(lambda _: True)


def test_a_lease_is_renewed_until_the_process_stands_still(hosts: tuple[Host, Host], url: str) -> None:
    one, _ = hosts
    one.serve()
    with psycopg.connect(url, autocommit=True) as connection:
        (before,) = connection.execute("SELECT until FROM fl_adapters.lease").fetchone()  # type: ignore[misc]
        waited = threading.Event()
        for _ in range(100):
            (after,) = connection.execute("SELECT until FROM fl_adapters.lease").fetchone()  # type: ignore[misc]
            if after > before:
                break
            waited.wait(0.05)
    assert after > before
    assert one.lease.held


def test_swept_tensors_are_those_of_nobody(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    store = one.serve()
    folder = one.root / "job" / "server"
    blobs = store.blobs(folder)
    kept, left = blobs.create("model-1", MANIFEST), blobs.create("update-1", MANIFEST)
    for blob in (kept, left):
        blob.buffer[:] = np.arange(12)
        blobs.settle(blob)
    blobs.sweep({kept.name})
    again = store.blobs(folder)
    assert again.open(kept.name, MANIFEST).buffer.tolist() == list(range(12))
    with pytest.raises(StoreError, match="shared place"):
        again.open(left.name, MANIFEST)
    freed = again.open(kept.name, MANIFEST)
    again.free(freed)
    with pytest.raises(StoreError, match="shared place"):
        store.blobs(folder).open(kept.name, MANIFEST)


def test_a_folder_of_jobs_of_a_server_that_stood_alone_is_left_alone(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    (one.root / "precious").mkdir(parents=True)
    (one.root / "precious" / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="such as precious"):
        one.serve()
    assert (one.root / "precious" / "job.json").exists()


def test_each_federation_has_a_database_of_its_own(hosts: tuple[Host, Host], url: str) -> None:
    with pytest.raises(ConfigError, match="of the federation study, not of another"):
        Lease(url, "another", "three")


def test_messages_hold_no_password() -> None:
    for text in ("postgresql://fl:secret@127.0.0.1:1/none", "host=127.0.0.1 port=1 password=secret"):
        with pytest.raises(StoreError) as caught:
            Lease(text, "study", "one")
        assert "secret" not in str(caught.value)
