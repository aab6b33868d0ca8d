"""A whole federation inside one process, for tests of adapters and training loops. Part of `fl_adapters.testing`."""

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

from fl_adapters.environments.models import Which, load_model
from fl_adapters.participant.kit import Kit, read_kit
from fl_adapters.participant.local_work.site_plan import SitePlan
from fl_adapters.participant.registry import close_sessions, end_finished_script
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.server import RunResult, Server
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trainings import training_folder
from fl_runtime.transport import memory
from fl_runtime.transport.base import Peer, Service
from fl_runtime.types import Arrays, Event, RunSettings, Strategy
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

T = TypeVar("T")

State = tuple[Callable[[], Any], Callable[[Any], None]]
"""Getter and setter of a state that belongs to the process, such as `(torch.get_rng_state, torch.set_rng_state)`."""

_ENDING_S = 5.0
_LOOK_S = 0.02
_PYTHON: State = (random.getstate, random.setstate)
_NUMPY: State = (np.random.get_state, np.random.set_state)


@dataclass(frozen=True)
class Place:
    """One site's place in a `LocalFederation`.

    Attributes:
        name: Name of the site.
        index: Position of the site, from 0.
        count: Number of sites.
        kit: Folder of the site's startup kit, for an adapter's argument `kit=` or for `$FL_ADAPTERS_KIT`.
    """

    name: str
    index: int
    count: int
    kit: str


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """Result of a site's work: its return value, or the error that ended it.

    Attributes:
        value: Return value of the work; None if it raised.
        error: The exception that it raised; None if it returned.
    """

    value: T | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Death:
    """A site's process that dies during a run, in a call to the server or elsewhere.

    At the site, a death in a call is a `SiteFailedError`; the test may then start the site's work again. The server
    never hears that the site has left.

    Attributes:
        site: Name of the site.
        method: Call in which it dies, such as "Next" or "Submit". "" stands for an error in the site's own code.
        number: Which of the site's calls of `method`, counted from 1.
        heard: Whether the site dies after the server's answer. False: before the server receives the call.
    """

    site: str
    method: str = ""
    number: int = 1
    heard: bool = False


class LocalFederation:
    """A server in this process, and startup kits for its sites: a simulation without processes or sockets.

    Use it in a `with` block: the kits exist inside of it, and its end stops the run.

    Args:
        sites: Number of sites, or their names.
        sockets: Serve over gRPC on the loopback, so that other processes can take part.
        states: Getters and setters of states that belong to the process but that each site needs for itself, such as a
            framework's random state. With it (an empty list will do), sites run one at a time, each with states of
            its own; those of Python and NumPy are always included.
        folder: Folder of the run, with the layout of `runs/<job>`. By default a temporary one that is deleted.
        name: Name of the job.
        deaths: Sites that die during the run, and when. Not supported with `sockets`.
        workflow: Strategy object in place of the one that `settings` name.
        **settings: Further fields of `RunSettings`, such as `rounds`, `every` and `strategy`. `min_sites` is the number
            of sites by default.

    Attributes:
        folder: Folder of the run.
        places: One `Place` per site, in order; empty before the `with` block.
        server: The server itself.
        tokens: Secret of each site, by name.

    Raises:
        ConfigError: The settings do not fit together.

    Example:
        >>> with LocalFederation(sites=2, rounds=3) as federation:
        ...     weights = federation.run(lambda place: train(kit=place.kit))
        ...     model = federation.model()
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
        if states is not None and SitePlan.parse(self._settings.strategy).relayed:
            raise ConfigError(
                "sites of a swarm wait for each other, but with states= they run one at a time",
                where="LocalFederation",
                fix="leave states out, or run the sites in processes of their own",
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
        self.server.abort("the test is over")  # no effect on a run that has ended
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
        """All events of the run so far, in order; the caller's own list."""
        self.server.delivered(_ENDING_S)
        return list(self._events)

    def run(self, work: Callable[[Place], T], *, timeout_s: float = 120.0) -> dict[str, T]:
        """Run the same work at every site, in one thread per site.

        When `work` returns, the site's session is closed, as the end of a script would do.

        Args:
            work: Function that is called with each site's `Place`, typically one that trains with `kit=place.kit`.
            timeout_s: Seconds to wait for all sites together.

        Returns:
            Return values of `work` by site.

        Raises:
            BaseException: The first error of any site, after all sites have ended.
            TimeoutError: A site has not ended in time. The run is aborted.
        """
        outcomes = self.outcomes({place.name: work for place in self.places}, timeout_s=timeout_s)
        return {name: outcome.value for name, outcome in outcomes.items()}  # type: ignore[misc]

    def outcomes(
        self, work: Mapping[str, Callable[[Place], T]], *, timeout_s: float = 120.0, check: bool = True
    ) -> dict[str, Outcome[T]]:
        """Run different work at each site, in one thread per site.

        Args:
            work: Function for each site, by the site's name. Sites without one do not take part.
            timeout_s: Seconds to wait for all sites together.
            check: Whether to raise the first error of any site. False returns errors in the outcomes.

        Returns:
            Outcome of each site's work, by site.

        Raises:
            BaseException: With `check`, the first error of any site, after all sites have ended.
            TimeoutError: A site has not ended in time. The run is aborted.
        """
        outcomes: dict[str, Outcome[T]] = {}
        first: list[BaseException] = []

        def site(place: Place) -> None:
            try:
                outcomes[place.name] = Outcome(work[place.name](place))
            except BaseException as error:
                first.append(error)
                outcomes[place.name] = Outcome(error=error)
                close_sessions(f"{type(error).__name__}: {error}", read_kit(place.kit), failed=True)
            else:
                close_sessions("its script ended before the last round", read_kit(place.kit), failed=False)

        places = [place for place in self.places if place.name in work]
        self._in_threads(site, places, timeout_s)
        if check and first:
            raise first[0]
        return {place.name: outcomes[place.name] for place in places}

    def result(self, timeout_s: float = 10.0) -> RunResult:
        """Wait for the end of the run and return its result.

        Scripts of this process whose training is over count as ended: they may train outside of `run`.

        Args:
            timeout_s: Seconds to wait.

        Returns:
            Rounds, best round and bytes of the run.

        Raises:
            FederationError: The run failed; this is its error.
            TimeoutError: The run has not ended in time, because a site has not left.
        """
        deadline = time.monotonic() + timeout_s
        while not self.server.wait(_LOOK_S):
            for place in self.places:  # again and again: a site may finish in a thread of the caller's
                end_finished_script(read_kit(place.kit))
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run has not ended within {timeout_s:g} s: a site has not left")
        result = self.server.result()
        if result.error is not None:
            raise result.error
        return result

    def model(self, which: Literal["final", "best"] = "final", *, training: int = 1) -> Arrays:
        """The global model as the server exports it.

        Args:
            which: "final" for the newest model, "best" for that of the best round.
            training: Number of the training, from 1, if the work trains more than once.

        Returns:
            Arrays by tensor name, owned by the caller.

        Raises:
            FederationError: There is no such model yet.
        """
        path = self.server.export(training_folder(self.folder, training) / which, which, training=training)
        if path is None:
            raise FederationError("there is no global model yet")
        return {name: np.copy(array) for name, array in read_tensors(path).items()}

    def load(self, into: Any = None, *, which: Which = "final", partial: bool = False) -> Any:
        """The global model, opened with the call of the framework that trained it.

        Args:
            into: See `SavedRun.load`.
            which: "final" for the last global model, "best" for that of the best round.
            partial: See `SavedRun.load`.

        Returns:
            The model; see `SavedRun.load`.

        Raises:
            FederationError: There is no such model, or it cannot be opened in this way.
        """
        folder = self.folder / ("model" if which == "final" else which)
        if not folder.exists():  # no adapter has written it
            self.server.export(folder, which)
        return load_model(self.folder, into, which=which, partial=partial)

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
                self._turns.set(before)  # every site starts like a new process
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
    """Lets one site's thread run at a time, with its own states. A thread that waits for the server gives way."""

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
        """Let other threads run during this block. Does nothing for a thread without a turn."""
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
    """Counts the calls of the sites that are to die, and ends those calls. Hides from the server that they leave."""

    def __init__(self, deaths: Sequence[Death]) -> None:
        self._deaths = deaths
        self._calls: Counter[tuple[str, str]] = Counter()

    def handle(self, service: Service, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The service's replies, up to the death of the site if it dies in this call."""
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
    raise SiteFailedError(f"the process of {site} has died", where="as the test requested")
    yield b""


@dataclass(frozen=True)
class _TurnService:
    """A service whose callers give up their turn while they wait for its replies.

    The memory transport runs a call in the caller's own thread, so that thread waits here.
    """

    service: Service
    turns: _Turns | None
    deaths: _Deaths

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        replies = self.deaths.handle(self.service, method, peer, requests)
        return replies if self.turns is None else self._given_up(self.turns, replies)

    def _given_up(self, turns: _Turns, replies: Iterator[bytes]) -> Iterator[bytes]:
        end = object()
        while True:
            with turns.given_up():
                message: Any = next(replies, end)
            if message is end:
                return
            yield message
