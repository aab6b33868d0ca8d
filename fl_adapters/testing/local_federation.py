"""A whole federation inside one process, for tests of adapters and of training loops; public in testing.py."""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from fl_adapters.participant.kit import Kit, read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.participant.swarm import is_swarm
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.server import RunResult, Server
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport import memory
from fl_runtime.transport.base import Peer, Service
from fl_runtime.types import Arrays, Event, RunSettings, Strategy
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

T = TypeVar("T")

State = tuple[Callable[[], Any], Callable[[Any], None]]
"""(get, set) of something that belongs to the process, such as `(torch.get_rng_state, torch.set_rng_state)`."""

_ENDING_S = 5.0
_PYTHON: State = (random.getstate, random.setstate)
_NUMPY: State = (np.random.get_state, np.random.set_state)


@dataclass(frozen=True)
class Place:
    """One site's place in a federation. kit: its startup kit, for `kit=` or `$FL_ADAPTERS_KIT`."""

    name: str
    index: int
    count: int
    kit: str


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a site's work came to: its value, or the error that ended it."""

    value: T | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Death:
    """The process of a site dies in a call to the server: the `number`th of `method` ("Next", "Submit", ...) that it
    makes, counted from 1; before the server hears of it, or (heard) after it has answered. method "": elsewhere, by an
    error of its own. Either way the server does not hear it leave.
    """

    site: str
    method: str = ""
    number: int = 1
    heard: bool = False


class LocalFederation:
    """A server in this process and startup kits for its sites: a simulation without processes or sockets.

    sites: how many, or their names. sockets: serve over gRPC on the loopback, so that other processes can take part.
    states: what a site must have for itself although it belongs to the process, such as a framework's random
    state; with it (an empty list will do) the sites run one at a time, and each goes on with its own states, those
    of Python and NumPy included. folder: of the run, as `runs/<job>` would be; a temporary one by default, deleted
    at the end. deaths: what goes wrong; without sockets. A death in a call is a SiteFailedError at the site, which may
    then begin anew. workflow: a strategy of one's own, in place of that which the settings name. settings: further
    fields of RunSettings; min_sites is the number of sites by default.
    """

    def __init__(
        self,
        *,
        sites: int | Sequence[str] = 2,
        sockets: bool = False,
        states: Sequence[State] | None = None,
        folder: Path | str | None = None,
        name: str = "test",
        deaths: Sequence[Death] = (),
        workflow: Strategy | None = None,
        **settings: Any,
    ) -> None:
        names = tuple(f"site-{n}" for n in range(1, sites + 1)) if isinstance(sites, int) else tuple(sites)
        self._settings = RunSettings(**{"name": name, "sites": names, "min_sites": len(names), **settings})
        self._sockets = sockets
        if states is not None and is_swarm(self._settings.strategy):
            raise ConfigError(
                "under swarm sites wait for each other, and with states= they run one at a time",
                where="LocalFederation",
                fix="leave states out, and give the sites processes of their own where they share random states",
            )
        self._turns = None if states is None else _Turns([_PYTHON, _NUMPY, *states])
        self._deaths = _Deaths(deaths)
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="fl-adapters-")) if folder is None else Path(folder)
        self._events: list[Event] = []
        self.tokens = {name: secrets.token_urlsafe(8) for name in names}
        self.server = Server(
            self._settings, self.folder, self.tokens, listeners=[self._events.append], strategy=workflow
        )
        self._serving = ExitStack()
        self.places: tuple[Place, ...] = ()

    def __enter__(self) -> LocalFederation:
        if self._sockets:
            address = self.server.start()
        else:
            service = self.server.service
            address = self._serving.enter_context(memory.serving(_TurnService(service, self._turns, self._deaths)))
            self.server.begin()
        self.places = tuple(self._place(name, index, address) for index, name in enumerate(self._settings.sites))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.server.abort("the test is over")  # changes nothing for a run that has ended
        for place in self.places:
            close_sessions("the test is over", read_kit(place.kit))
        self.server.wait(_ENDING_S)
        self._serving.close()
        self.server.close()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)
        return False

    @property
    def events(self) -> list[Event]:
        """All that has happened so far."""
        self.server.delivered(_ENDING_S)
        return list(self._events)

    def run(self, work: Callable[[Place], T], *, timeout_s: float = 120.0) -> dict[str, T]:
        """work(place) for every site at once, in a thread each; its values by site.

        When work returns, its session is closed, as the end of a script would do. Raises the first error of any
        site, after all have ended.
        """
        outcomes = self.outcomes({place.name: work for place in self.places}, timeout_s=timeout_s)
        return {name: outcome.value for name, outcome in outcomes.items()}  # type: ignore[misc]

    def outcomes(
        self, work: Mapping[str, Callable[[Place], T]], *, timeout_s: float = 120.0, check: bool = True
    ) -> dict[str, Outcome[T]]:
        """Like `run`, with work of its own for every site. check=False: errors are given back, and not raised."""
        outcomes: dict[str, Outcome[T]] = {}
        first: list[BaseException] = []

        def site(place: Place) -> None:
            try:
                outcomes[place.name] = Outcome(work[place.name](place))
            except BaseException as error:
                first.append(error)
                outcomes[place.name] = Outcome(error=error)
                close_sessions(f"{type(error).__name__}: {error}", read_kit(place.kit))
            else:
                close_sessions("its script ended before the last round", read_kit(place.kit))

        places = [place for place in self.places if place.name in work]
        self._in_threads(site, places, timeout_s)
        if check and first:
            raise first[0]
        return {place.name: outcomes[place.name] for place in places}

    def result(self, timeout_s: float = 10.0) -> RunResult:
        """What the run came to, once it has ended. Raises its error."""
        if not self.server.wait(timeout_s):
            raise TimeoutError(f"the run has not ended within {timeout_s:g} s: a site has not left")
        result = self.server.result()
        if result.error is not None:
            raise result.error
        return result

    def model(self, which: Literal["final", "best"] = "final") -> Arrays:
        """The global model, as the server would export it; the caller's own."""
        path = self.server.export(self.folder / which, which)
        if path is None:
            raise FederationError("there is no global model yet")
        return {name: np.copy(array) for name, array in read_tensors(path).items()}

    def _place(self, name: str, index: int, address: str) -> Place:
        kit = Kit(
            job=self._settings.name,
            site=name,
            index=index,
            count=len(self._settings.sites),
            server=address,
            token=self.tokens[name],
            run=str(self.folder),
            simulated=True,
        )
        return Place(name, index, kit.count, str(kit.save(self.folder / "sites" / name / "kit")))

    def _in_threads(self, site: Callable[[Place], None], places: Sequence[Place], timeout_s: float) -> None:
        before = None if self._turns is None else self._turns.get()

        def in_turn(place: Place) -> None:
            if self._turns is None:
                site(place)
                return
            with self._turns.taken():
                self._turns.set(before)  # every site begins as a process of its own would
                site(place)

        threads = [threading.Thread(target=in_turn, args=(p,), name=p.name, daemon=True) for p in places]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if self._turns is not None:
            self._turns.set(before)
        hanging = [thread.name for thread in threads if thread.is_alive()]
        if hanging:
            self.server.abort("the test has timed out")
            raise TimeoutError(f"{', '.join(hanging)} did not end within {timeout_s:g} s")


class _Turns:
    """Lets one site's thread run at a time, each with its own states. A thread that waits for the server gives way."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Others may run within this block. Threads that have no turn pass through."""
        if self._owner != threading.get_ident():
            yield
            return
        mine = self.get()
        self._owner = None
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._owner = threading.get_ident()
            self.set(mine)

    def get(self) -> list[Any]:
        return [get() for get, _ in self._states]

    def set(self, values: Any) -> None:
        for (_, set_state), value in zip(self._states, values, strict=True):
            set_state(value)


class _Deaths:
    """Counts the calls of the sites that are to die, and ends them there. That they leave early is not heard."""

    def __init__(self, deaths: Sequence[Death]) -> None:
        self._deaths = deaths
        self._calls: Counter[tuple[str, str]] = Counter()

    def along(self, service: Service, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The service's replies, up to the death that comes in this call."""
        mine = [death for death in self._deaths if death.site == peer.name]
        if mine and method == "Leave":
            first = next(requests)
            if pb.LeaveRequest.FromString(first).early:
                return _ended(peer.name)
            requests = chain([first], requests)
        self._calls[peer.name, method] += 1
        now = (method, self._calls[peer.name, method])
        due = [death for death in mine if (death.method, death.number) == now]
        replies = service.handle(method, peer, requests)
        return _ended(peer.name, replies if due[0].heard else None) if due else replies


def _ended(site: str, replies: Iterator[bytes] | None = None) -> Iterator[bytes]:
    for _ in replies or ():
        pass
    raise SiteFailedError(f"the process of {site} has died", where="as the test wants it")
    yield b""


@dataclass(frozen=True)
class _TurnService:
    """A service whose callers give up their turn while they wait for its replies.

    The memory transport runs a call in the caller's own thread, so this is where that thread waits.
    """

    service: Service
    turns: _Turns | None
    deaths: _Deaths

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        replies = self.deaths.along(self.service, method, peer, requests)
        return replies if self.turns is None else self._given_up(self.turns, replies)

    def _given_up(self, turns: _Turns, replies: Iterator[bytes]) -> Iterator[bytes]:
        end = object()
        while True:
            with turns.given_up():
                message: Any = next(replies, end)
            if message is end:
                return
            yield message
