"""A job's server as one object: what `fl-adapters simulate` embeds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import AbortedError, ConfigError
from fl_runtime.filters import check_filters
from fl_runtime.server.courses.rounds import drive
from fl_runtime.server.records.events import Events
from fl_runtime.server.records.results import RunResult
from fl_runtime.server.recovery import recover
from fl_runtime.server.run import Run
from fl_runtime.server.service import FederationService
from fl_runtime.store.lock import FolderLock
from fl_runtime.store.tensorfile import sync, write_tensors
from fl_runtime.transport.base import Service
from fl_runtime.types import Listener, RunSettings, Strategy

_THREADS_PER_SITE = 4  # presence, a waiting Next, streams, and the call of an attempt that takes over
_SPARE_THREADS = 8
_GRACE_S = 0.5
_LAST_STEP_S = 30.0  # the sum or the write to the disk that the round loop may be in when its server is closed


class Server:
    """Runs one job in `folder`/server, continuing what its journal holds. `tokens`: site name -> secret.

    Threads of its own do all the work; the methods may be called from any thread. service: what a transport serves,
    such as the memory transport of tests. share: all sites are on this machine and run for the same user: large
    payloads stay in files that both sides map, and only what is said of them crosses the socket.
    """

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        tokens: Mapping[str, str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        listeners: Sequence[Listener] = (),
        share: bool = False,
        strategy: Strategy | None = None,
        loop: Callable[[Run], None] = drive,
    ) -> None:
        """strategy: in place of the one that `settings` name, such as a workflow of one's own. loop: takes the run from
        where it stands to its end, where that is not for sites that call."""
        _check(settings, strategy)
        self._lock = FolderLock(folder / "server")
        self._host, self._port, self._tokens = host, port, dict(tokens)
        self._events = Events(listeners)
        try:
            self._run = Run(settings, folder / "server", self._events, strategy)
            recover(self._run)
            self._finished = self._run.journal.finished()
        except BaseException:
            self._events.close()
            self._lock.close()
            raise
        self.service: Service = FederationService(self._run, share=share)
        self._loop = threading.Thread(target=loop, args=(self._run,), name="fl-rounds", daemon=True)
        self._stop_serving: Callable[[float], None] | None = None

    def start(self) -> str:
        """Serve over gRPC and begin the run; returns "host:port". ConfigError when the port is in use."""
        from fl_runtime.transport.grpc import GrpcServer, tokens_to_names

        threads = _THREADS_PER_SITE * len(self._tokens) + _SPARE_THREADS
        server = GrpcServer(self.service, tokens_to_names(self._tokens), threads, len(self._tokens))
        address = server.start(self._host, self._port)
        self._stop_serving = server.stop
        self.begin()
        return address

    def begin(self) -> None:
        """Start the round loop alone, for a service that is not served over gRPC."""
        self._loop.start()

    def site_left(self, name: str, reason: str) -> None:
        """The site's process is known to be dead."""
        self._run.gone(name, reason, early=True)

    def expel(self, name: str, reason: str) -> None:
        """The site may not take part any more; nothing that it has under way counts."""
        self._run.expel(name, reason)

    def state(self) -> dict[str, Any]:
        """Where the run stands, for people: phase, round, rounds, and each site's state."""
        run = self._run
        with run.lock:
            sites = {
                m.name: f"gone: {m.gone}"
                if m.gone
                else "taking part"
                if m.active
                else "joined"
                if m.attempt
                else "awaited"
                for m in run.members.values()
            }
            return {
                "phase": run.phase,
                "round": run.open.round if run.open else len(run.results),
                "rounds": run.rounds,
                "sites": sites,
                "error": run.error.to_wire() if run.error else None,
            }

    @property
    def finished(self) -> bool:
        """The run had ended well before this server was made: there is nothing to go on with."""
        return self._finished

    def abort(self, reason: str) -> None:
        self._run.fail(AbortedError(reason))

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once the run has ended, one way or the other, and its listeners have heard of it."""
        return self._run.ended.wait(timeout_s) and self.delivered(timeout_s)

    def delivered(self, timeout_s: float | None = None) -> bool:
        """True once the listeners have heard of all that has happened so far. Not for listeners."""
        return self._events.delivered(timeout_s)

    def result(self) -> RunResult:
        """What there is so far."""
        run = self._run
        with run.lock:
            rounds = tuple(replace(r, metrics=run.scores.of(r.round)) for r in run.results)
            return RunResult(
                rounds=rounds,
                best_round=run.best.version if run.best else None,
                error=run.error,
                bytes_up=sum(r.bytes_up for r in rounds),
                bytes_down=sum(r.bytes_down for r in rounds),
            )

    def export(self, folder: Path, which: Literal["final", "best"] = "final") -> Path | None:
        """Write the global model as folder/model.safetensors, or in the strategy's own format; returns the file.

        None if there is no such model yet.
        """
        with self._run.lock:
            model = self._run.model if which == "final" else self._run.best
            if model is None:
                return None
            durable = self._run.settings.durability == "power"
            own = self._run.strategy.export(model.blob.views()[0])
            if own is not None:
                name, content = own
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
                if durable:
                    sync(folder / name)
                    sync(folder)
                return folder / name
            path = folder / "model.safetensors"
            metadata = {"format": "pt", "job": self._run.settings.name, "round": str(model.version)}
            write_tensors(path, model.blob.views()[0], metadata, durable=durable)
            return path

    def close(self) -> None:
        """Stop serving and deliver the last events. A run that has not ended can be continued later, by another server:
        nothing of this one touches its files any more."""
        if self._stop_serving:
            self._stop_serving(_GRACE_S)
        self._run.halt()
        if self._loop.is_alive():
            self._loop.join(_LAST_STEP_S)
        self._events.close()
        self._lock.close()


def _check(settings: RunSettings, strategy: Strategy | None) -> None:
    if strategy is None and settings.strategy:  # else the sites may say
        strategy = make_strategy(settings.strategy)
    check_filters(settings.filters, settings.optimizer_state, strategy)
    if not settings.sites or len(set(settings.sites)) != len(settings.sites):
        raise ConfigError(f"the sites of a job need distinct names, not {list(settings.sites)}")
    if settings.min_sites > len(settings.sites):
        raise ConfigError(
            f"min_sites is {settings.min_sites}, but the job has {len(settings.sites)} sites",
            fix="lower min_sites or add sites",
        )
