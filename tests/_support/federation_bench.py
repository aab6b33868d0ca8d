"""A server and sites that a test drives: over sockets or in memory, call by call or in threads."""

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
from fl_runtime.transport.turns import MEMORY_MIB
from fl_runtime.transport.waiting import Clock
from fl_runtime.types import Arrays, CohortRules, Event, RunSettings, Task, Update
from fl_runtime.wire.manifest import Manifest

K = TypeVar("K")
T = TypeVar("T")

WAIT_S = 30.0


class Watch:
    """A server's listener that tests wait on."""

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
        """Wait for the `count`-th event of this kind, and return it."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.all(kind, site)) >= count, WAIT_S):
                raise TimeoutError(f"no {kind} {site} within {WAIT_S:g} s: {[(e.kind, e.site) for e in self.events]}")
        return self.all(kind, site)[count - 1]


class Site:
    """One site's client, with the sequences of calls that tests make."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        patience_s: float = WAIT_S,
        *,
        same_machine: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.transport = name, transport
        self.client = SiteClient(transport, patience_s, same_machine=same_machine, clock=clock)

    def join(self, job: str = "") -> Welcome:
        self.welcome = self.client.join(job)
        return self.welcome

    def register(
        self,
        arrays: Arrays,
        *,
        rounds: int = 0,
        evaluates: bool = False,
        capabilities: frozenset[str] = frozenset(),
        rules: CohortRules | None = None,
        **agreement: str,
    ) -> int:
        return self.client.register(
            Manifest.of(arrays),
            agreement=agreement,
            info={},
            capabilities=capabilities,
            rounds=rounds,
            evaluates=evaluates,
            rules=rules,
        )

    def start(self, arrays: Arrays) -> Task:
        """Return the first task, after sending `arrays` as the initial model if the server asks for it."""
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
        self,
        arrays: Arrays,
        change: Callable[[Task], Arrays],
        num_examples: int = 1,
        *,
        job: str = "",
        **registration: Any,
    ) -> Arrays:
        """Join, register and answer every task with change(task); return the final weights."""
        self.join(job)
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
        """Stop without leaving, as a killed process does."""
        self.client.close()


def settings(sites: int | Sequence[str] = 2, **fields: Any) -> RunSettings:
    names = tuple(f"site-{n}" for n in range(1, sites + 1)) if isinstance(sites, int) else tuple(sites)
    return RunSettings(**{"name": "test", "sites": names, "min_sites": len(names), "rounds": 2, **fields})


class Bench:
    """A running server and its sites.

    Attributes:
        address: The server's "host:port"; empty in memory.
    """

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
        clock: Clock | None = None,
    ) -> Site:
        """Connect one more process of a site, through the proxy at `address` if one is given."""
        transport: Transport
        if self.address:
            from fl_runtime.transport.grpc import GrpcTransport

            transport = GrpcTransport(address or self.address, token or f"secret of {name}")
        else:
            transport = MemoryTransport(self.server.service, name)
        self.made.append(Site(name, transport, patience_s, same_machine=same_machine, clock=clock))
        return self.made[-1]

    def started(self, arrays: Arrays, **registration: Any) -> tuple[dict[str, Site], dict[str, Task]]:
        """Join and register all sites; return their first tasks."""
        sites = {name: self.site(name) for name in self.names}
        return sites, started(sites.values(), arrays, **registration)

    def run(self, work: Callable[[str], T]) -> dict[str, T]:
        """Call work(name) for every site, each in its own thread."""
        return dict(zip(self.names, at_once(self.names, work), strict=True))


@contextmanager
def serving(
    folder: Path,
    sites: int | Sequence[str] = 2,
    *,
    sockets: bool = True,
    port: int = 0,
    share: bool = False,
    clock: Clock | None = None,
    memory_mib: int = MEMORY_MIB,
    **fields: Any,
) -> Iterator[Bench]:
    """Run a server, and end what is left of its run afterwards."""
    run = settings(sites, **fields)
    watch = Watch()
    tokens = {name: f"secret of {name}" for name in run.sites}
    server = Server(run, folder, tokens, port=port, listeners=[watch], share=share, clock=clock, memory_mib=memory_mib)
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
    """Join and register these sites; return their first tasks."""
    registered(sites := list(sites), arrays, **registration)
    return {site.name: site.start(arrays) for site in sites}


def registered(sites: Iterable[Site], arrays: Arrays, **registration: Any) -> list[int]:
    """Join and register these sites at once; return the number of rounds that each is told."""
    for site in (sites := list(sites)):
        site.join()
    return at_once(sites, lambda site: site.register(arrays, **registration))


def at_once(items: Iterable[K], work: Callable[[K], T]) -> list[T]:
    """Call work(item) for each item in its own thread, and return the results in order.

    When all have ended, the first error in the order of the items is raised.
    """
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(work, item) for item in items]
        return [future.result(WAIT_S * 2) for future in futures]


def errors_at_once(items: Iterable[K], work: Callable[[K], object]) -> list[BaseException | None]:
    """Call work(item) for each item in its own thread; return the errors that they raise."""
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(work, item) for item in items]
        return [future.exception(WAIT_S * 2) for future in futures]


def errors_together(*calls: Callable[[], object]) -> list[BaseException | None]:
    """Make each call in its own thread; return the errors that they raise."""
    return errors_at_once(calls, lambda call: call())


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make each call in its own thread; return the results."""
    return at_once(calls, lambda call: call())


def ended(server: Server) -> None:
    """Wait for the end of the run, and raise its error if it failed."""
    assert server.wait(WAIT_S), "the run did not end"
    error = server.result().error
    if error is not None:
        raise error
