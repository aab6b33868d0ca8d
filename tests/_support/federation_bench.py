"""Sites driven from a test, over real sockets or in memory, one call at a time or in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fl_runtime.client import SiteClient, Welcome
from fl_runtime.server import Server
from fl_runtime.transport.base import Transport
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Arrays, Event, RunSettings, Task, Update
from fl_runtime.wire.manifest import Manifest

K = TypeVar("K")
T = TypeVar("T")

WAIT_S = 30.0


class Watch:
    """A listener that tests wait on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def all(self, kind: str, site: str = "") -> list[Event]:
        return [e for e in list(self.events) if e.kind == kind and site in ("", e.site)]

    def wait(self, kind: str, site: str = "", count: int = 1) -> Event:
        """The `count`-th event of this kind, once it has happened."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.all(kind, site)) >= count, WAIT_S):
                raise TimeoutError(f"no {kind} {site} within {WAIT_S:g} s: {[(e.kind, e.site) for e in self.events]}")
        return self.all(kind, site)[count - 1]


class Site:
    """One site's client, with the calls that tests make in a row."""

    def __init__(
        self, name: str, transport: Transport, patience_s: float = WAIT_S, *, same_machine: bool = False
    ) -> None:
        self.name, self.transport = name, transport
        self.client = SiteClient(transport, patience_s, same_machine=same_machine)

    def join(self) -> Welcome:
        self.welcome = self.client.join()
        return self.welcome

    def register(
        self,
        arrays: Arrays,
        *,
        rounds: int = 0,
        evaluates: bool = False,
        capabilities: frozenset[str] = frozenset(),
        **agreement: str,
    ) -> int:
        return self.client.register(
            Manifest.of(arrays),
            agreement=agreement,
            info={},
            capabilities=capabilities,
            rounds=rounds,
            evaluates=evaluates,
        )

    def start(self, arrays: Arrays) -> Task:
        """The first task; gives `arrays` as the initial model where the server asks."""
        task = self.client.next_task()
        if task.kind == "initial":
            self.submit(task, arrays)
            task = self.client.next_task()
        return task

    def submit(self, task: Task, arrays: Arrays, num_examples: int = 1, **fields: Any) -> str:
        update = Update(
            job=task.job,
            round=task.round,
            stage=task.stage,
            site=self.name,
            attempt=self.welcome.attempt,
            base_version=task.version,
            arrays=arrays,
            num_examples=num_examples,
            **fields,
        )
        return self.client.submit(update)

    def take_part(
        self, arrays: Arrays, change: Callable[[Task], Arrays], num_examples: int = 1, **registration: Any
    ) -> Arrays:
        """Join, register and answer every task with change(task); the final weights."""
        self.join()
        self.register(arrays, **registration)
        task = self.start(arrays)
        while task.kind == "train":
            self.submit(task, change(task), num_examples)
            task = self.client.next_task()
        final = {name: np.copy(array) for name, array in task.arrays.items()}
        self.client.leave("done", early=False)
        self.client.close()
        return final

    def vanish(self) -> None:
        """Go without a word, as a killed process does."""
        self.client.close()


def settings(sites: int | Sequence[str] = 2, **fields: Any) -> RunSettings:
    names = tuple(f"site-{n}" for n in range(1, sites + 1)) if isinstance(sites, int) else tuple(sites)
    return RunSettings(**{"name": "test", "sites": names, "min_sites": len(names), "rounds": 2, **fields})


class Bench:
    """A server and its sites. address: "host:port" of the server, "" in memory."""

    def __init__(self, server: Server, names: Sequence[str], watch: Watch, address: str) -> None:
        self.server, self.names, self.watch, self.address = server, tuple(names), watch, address
        self.made: list[Site] = []

    def site(
        self,
        name: str,
        *,
        address: str = "",
        token: str = "",
        patience_s: float = WAIT_S,
        same_machine: bool = False,
    ) -> Site:
        """A new process of a site, as it were. address: go through a proxy."""
        transport: Transport
        if self.address:
            from fl_runtime.transport.grpc import GrpcTransport

            transport = GrpcTransport(address or self.address, token or f"secret of {name}")
        else:
            transport = MemoryTransport(self.server.service, name)
        self.made.append(Site(name, transport, patience_s, same_machine=same_machine))
        return self.made[-1]

    def started(self, arrays: Arrays, **registration: Any) -> tuple[dict[str, Site], dict[str, Task]]:
        """All sites, joined and registered, and their first tasks."""
        sites = {name: self.site(name) for name in self.names}
        return sites, started(sites.values(), arrays, **registration)

    def run(self, work: Callable[[str], T]) -> dict[str, T]:
        """work(name) for every site at once."""
        return dict(zip(self.names, at_once(self.names, work), strict=True))


@contextmanager
def serving(
    folder: Path,
    sites: int | Sequence[str] = 2,
    *,
    sockets: bool = True,
    port: int = 0,
    share: bool = False,
    **fields: Any,
) -> Iterator[Bench]:
    """A running server; whatever is left of the run is ended afterwards."""
    run = settings(sites, **fields)
    watch = Watch()
    tokens = {name: f"secret of {name}" for name in run.sites}
    server = Server(run, folder, tokens, port=port, listeners=[watch], share=share)
    if sockets:
        address = server.start()
    else:
        server.begin()
        address = ""
    bench = Bench(server, run.sites, watch, address)
    try:
        yield bench
    finally:
        server.abort("the test is over")
        for site in bench.made:
            site.vanish()
        for name in run.sites:
            server.site_left(name, "the test is over")
        server.wait(WAIT_S)
        server.close()


def started(sites: Iterable[Site], arrays: Arrays, **registration: Any) -> dict[str, Task]:
    """Join and register these sites; their first tasks."""
    registered(sites := list(sites), arrays, **registration)
    return {site.name: site.start(arrays) for site in sites}


def registered(sites: Iterable[Site], arrays: Arrays, **registration: Any) -> list[int]:
    """Join and register these sites at once; the rounds that each is told."""
    for site in (sites := list(sites)):
        site.join()
    return at_once(sites, lambda site: site.register(arrays, **registration))


def at_once(items: Iterable[K], work: Callable[[K], T]) -> list[T]:
    """work(item) for all in threads, in order; the first error in that order, once all have ended."""
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(work, item) for item in items]
        return [future.result(WAIT_S * 2) for future in futures]


def errors_at_once(items: Iterable[K], work: Callable[[K], object]) -> list[BaseException | None]:
    """What work(item) raises, for all in threads."""
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(work, item) for item in items]
        return [future.exception(WAIT_S * 2) for future in futures]


def errors_together(*calls: Callable[[], object]) -> list[BaseException | None]:
    """What these calls raise, each in a thread of its own."""
    return errors_at_once(calls, lambda call: call())


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What these calls return, each in a thread of its own."""
    return at_once(calls, lambda call: call())


def ended(server: Server) -> None:
    """Wait for the end of the run; raises its error."""
    assert server.wait(WAIT_S), "the run did not end"
    error = server.result().error
    if error is not None:
        raise error
