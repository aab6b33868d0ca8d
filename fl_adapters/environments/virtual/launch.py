"""Starts the worker processes of virtual sites: new interpreters that import the function, or forked copies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fl_adapters.environments.processes import SiteProcesses
from fl_adapters.environments.processes.interrupts import interrupts_held
from fl_adapters.environments.processes.reaper import Reaper
from fl_adapters.environments.virtual import worker
from fl_adapters.environments.virtual.function import SiteFunction
from fl_runtime.errors import ConfigError

_ENDING_S = 5.0
_POLL_S = 0.005


class Launcher(Protocol):
    """Starts and ends worker processes, which it knows by name."""

    def start(self, name: str, theirs: socket.socket, ours: Sequence[socket.socket]) -> None:
        """Start a worker process.

        Args:
            name: Name of the worker.
            theirs: The worker's end of the socket that carries its orders.
            ours: Sockets of this process. The worker must close them, else the end of another worker goes unnoticed.
        """
        ...

    def kill(self, name: str) -> None:
        """Kill a worker process at once."""
        ...

    def status(self, name: str) -> int:
        """Wait for a worker that is ending, and kill it after a while. Returns its exit status, as of `subprocess`."""
        ...

    def close(self) -> None:
        """Kill all remaining workers."""
        ...


class Importing:
    """Launches workers as new interpreters that import the function by its name.

    Args:
        app: Name of the function, such as `train.py:train`.
        args: Command-line arguments that the function's module finds in `sys.argv`.
        logs: Folder for the workers' output.
        environments: Environment variables of each worker, by its name.
    """

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
    """Launches workers as forked copies of this process, which therefore have the function. None outlives it.

    Args:
        function: The function that all sites share.
        logs: Folder for the workers' output.

    Raises:
        ConfigError: The system cannot fork.
    """

    def __init__(self, function: SiteFunction, logs: Path) -> None:
        if os.name != "posix":
            raise ConfigError(
                "this system cannot fork, so workers cannot use a function that is passed as an object",
                where="Simulation(function=)",
                fix='name it instead: Job(app="train.py:train")',
            )
        self._function, self._logs = function, logs
        self._context = multiprocessing.get_context("fork")
        self._children: dict[str, Any] = {}
        self._reaper = Reaper()

    def start(self, name: str, theirs: socket.socket, ours: Sequence[socket.socket]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        arguments = (theirs, tuple(ours), self._logs / f"{name}.txt")
        child = self._context.Process(target=self._child, args=arguments, daemon=True)
        with interrupts_held():
            child.start()
            self._children[name] = child
            assert child.pid is not None
            self._reaper.add(child.pid)

    def kill(self, name: str) -> None:
        self._children[name].kill()

    def status(self, name: str) -> int:
        self._children[name].join(_ENDING_S)
        self._children[name].kill()
        self._children[name].join()
        self._reaper.remove(self._children[name].pid)
        return int(self._children[name].exitcode)

    def close(self) -> None:
        for child in self._children.values():
            child.kill()
            child.join()
        self._reaper.close()

    def _child(self, line: socket.socket, ours: Sequence[socket.socket], log: Path) -> None:
        os.setsid()  # a process group, as the reaper ends them
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent holds interrupts while it forks
        self._reaper.let_go()
        for other in ours:
            other.close()
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")  # not 1 and 2 in a notebook
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        worker.serve(line, self._function, None)
