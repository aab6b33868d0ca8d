"""How the worker processes of virtual sites are started: as interpreters that import the function, or as copies."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fl_adapters.environments.processes import SiteProcesses
from fl_adapters.environments.virtual import worker
from fl_adapters.environments.virtual.function import Function
from fl_runtime.errors import ConfigError

_ENDING_S = 5.0
_POLL_S = 0.005


class Launcher(Protocol):
    """How a worker process comes to be, and ends."""

    def start(self, name: str, theirs: socket.socket, ours: Sequence[socket.socket]) -> None:
        """theirs: its end of the line. ours: what it must not keep open, for then nobody would hear it hang up."""
        ...

    def kill(self, name: str) -> None: ...
    def status(self, name: str) -> int:
        """Waits for its end, which is near, and brings it about if it does not come; as subprocess has it."""
        ...

    def close(self) -> None: ...


class Importing:
    """Fresh interpreters, which import the function by its name. args: what the function's module finds in sys.argv.
    environments: one per worker."""

    def __init__(
        self, app: str, args: Sequence[str], logs: Path, environments: Mapping[str, Mapping[str, str]]
    ) -> None:
        self._app, self._logs, self._environments = (app, *args), logs, environments
        self._processes = SiteProcesses()
        self._ended: dict[str, int] = {}

    def start(self, name: str, theirs: socket.socket, ours: Sequence[socket.socket]) -> None:
        own = str(theirs.fileno())
        command = [sys.executable, "-m", worker.__name__, own, *self._app]
        self._ended.pop(name, None)
        self._processes.start(name, command, self._environments[name], self._logs / f"{name}.txt", (theirs.fileno(),))

    def kill(self, name: str) -> None:
        if name in self._processes.running:
            self._processes.kill(name)

    def status(self, name: str) -> int:
        patience = time.monotonic() + _ENDING_S
        while name not in self._ended:
            self._ended.update(self._processes.ended())
            if time.monotonic() > patience:
                self.kill(name)
            time.sleep(_POLL_S)
        return self._ended[name]

    def close(self) -> None:
        self._processes.close()


class Forking:
    """Children of this process, which have the function because they are copies of it."""

    def __init__(self, function: Function, logs: Path) -> None:
        if os.name != "posix":
            raise ConfigError(
                "this system cannot copy processes, so workers cannot have a function that is given as an object",
                where="Simulation(function=)",
                fix='name it instead: Job(app="train.py:train")',
            )
        self._function, self._logs = function, logs
        self._context = multiprocessing.get_context("fork")
        self._children: dict[str, Any] = {}

    def start(self, name: str, theirs: socket.socket, ours: Sequence[socket.socket]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        arguments = (theirs, tuple(ours), self._logs / f"{name}.txt")
        child = self._context.Process(target=self._child, args=arguments, daemon=True)
        child.start()
        self._children[name] = child

    def kill(self, name: str) -> None:
        self._children[name].kill()

    def status(self, name: str) -> int:
        self._children[name].join(_ENDING_S)
        self._children[name].kill()
        self._children[name].join()
        return int(self._children[name].exitcode)

    def close(self) -> None:
        for child in self._children.values():
            child.kill()
            child.join()

    def _child(self, line: socket.socket, ours: Sequence[socket.socket], log: Path) -> None:
        for other in ours:
            other.close()
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")  # in a notebook not 1 and 2
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        worker.serve(line, self._function, None)
