"""Servers that stand in for each other (`fl-adapters server --store`): one serves, the others wait for its lease."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.log_lines import say
from fl_adapters.extras import needs_extra
from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store.data_folder import is_locked
from fl_runtime.store.stores import Storage
from fl_runtime.yaml_files import read_yaml

if TYPE_CHECKING:
    from fl_runtime.store.lease import Lease
    from fl_runtime.store.shared import SharedStore
    from fl_runtime.trust.kits import StartupKit

_AGAIN_S = 1.0
_RENEWALS = "renewals.json"


@dataclass(frozen=True)
class StoreFile:
    """The file that names what several servers share.

    Attributes:
        database: PostgreSQL: "postgresql://user@host/database", or another text that libpq understands.
        tensors: A folder that all servers mount, or a URL that fsspec knows, such as "s3://bucket/prefix".
    """

    database: str
    tensors: str


def read_store_file(path: Path) -> StoreFile:
    """Read a store file. Only its owner may read it, since it may hold the password of the database.

    Args:
        path: The file (YAML).

    Returns:
        Its fields.

    Raises:
        ConfigError: It cannot be read, others can read it, or it has not these two fields.
    """
    from fl_runtime.trust.files import check_private

    fields = read_yaml(path, "the store file")
    check = isinstance(fields, dict) and set(fields) == {"database", "tensors"}
    if not check or not all(isinstance(value, str) and value for value in fields.values()):
        raise ConfigError(
            "a store file has two fields with text: database and tensors",
            where=str(path),
            fix="write database: postgresql://user@host/name and tensors: /a/shared/folder or s3://bucket/prefix",
        )
    check_private(path)
    return StoreFile(**fields)


def serve_in_turn(
    store_file: Path,
    kit: StartupKit,
    folder: Path,
    stop: threading.Event,
    serve: Callable[[Storage, Callable[[], bool]], int | None],
    on_trouble: Callable[[str], None],
) -> int:
    """Wait for the lease, serve while it is held, and wait again when it was lost.

    Args:
        store_file: Names what the servers share.
        kit: The server's kit.
        folder: This server's own folder for runs, absolute.
        stop: Set to end.
        serve: Serves until its second argument returns False, and then returns None; or returns the exit status.
        on_trouble: Is told why the store cannot be used, and "" when it can be used again.

    Returns:
        The exit status.

    Raises:
        ConfigError: The store belongs to another federation, or the folder holds jobs of a server that stood alone.
        ImportError: The extra `[failover]` is not installed.
    """
    with needs_extra("failover", "PostgreSQL's driver or fsspec"):
        from fl_runtime.store.lease import Lease

    places, said = read_store_file(store_file), ""
    if is_locked(folder):
        raise ConfigError(
            "another server uses this data folder",
            where=str(folder),
            fix="give each server a folder of its own by --data",
        )
    holder = f"{kit.identity.name} on {socket.gethostname()}"
    while not stop.is_set():
        try:
            with closing(Lease(places.database, kit.identity.federation, holder)) as lease:
                on_trouble("")
                say(f"{kit.identity.federation}: standing by; the last to serve was {lease.holder() or 'nobody'}")
                if not lease.acquire(stop.wait):
                    return 0
                say(f"{kit.identity.federation}: taking over with lease {lease.epoch}")
                status = _serve_one_lease(lease, places, kit, folder, serve)
                if status is not None:
                    return status
                say(f"{kit.identity.federation}: not serving any more: {lease.reason}", warning=True)
        except StoreError as error:
            on_trouble(error.what)
            if str(error) != said:  # once, since it is tried again and again
                said = str(error)
                say(said, warning=True)
        stop.wait(_AGAIN_S)  # for another server to come first
    return 0


def _serve_one_lease(
    lease: Lease,
    places: StoreFile,
    kit: StartupKit,
    folder: Path,
    serve: Callable[[Storage, Callable[[], bool]], int | None],
) -> int | None:
    from fl_runtime.server.records.history import event_line
    from fl_runtime.store.copies import SharedPlace
    from fl_runtime.store.shared import SharedStore

    with closing(SharedStore(lease, SharedPlace(places.tensors), folder, event_line)) as store:
        store.restore()
        renewals = _Renewals(store, kit.folder / _RENEWALS)

        def may_go_on() -> bool:
            if lease.held:
                renewals.keep()
            return lease.held

        return serve(Storage(store, store, shared=True), may_go_on)


class _Renewals:
    """The record of renewed certificates in a kit, which the next server takes up."""

    def __init__(self, store: SharedStore, file: Path) -> None:
        self._store, self._file = store, file
        self._kept = store.kept(file.name)
        if self._kept is not None:
            file.write_bytes(self._kept)

    def keep(self) -> None:
        """Keep the record if it has changed."""
        data = self._file.read_bytes() if self._file.exists() else None
        if data is not None and data != self._kept:
            self._store.keep(self._file, data)
            self._kept = data
