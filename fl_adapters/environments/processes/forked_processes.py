"""Site processes that are forked from one which has imported what their script imports first; see `fork_server.py`."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_adapters.environments.processes import fork_server, leading_imports
from fl_adapters.environments.processes.interrupts import interrupts_held

_PATIENCE_S = 5.0


class ForkedProcess:
    """A forked process, with the part of `subprocess.Popen` that `SiteProcesses` uses.

    Attributes:
        pid: Number of the process.
        returncode: Exit status as of `subprocess`; None while the process runs.
    """

    def __init__(self, pid: int, owner: ForkedProcesses) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._owner = owner

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self.returncode is None:
            self._owner.receive(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Args:
            timeout: Seconds; None waits without limit.

        Returns:
            The exit status.

        Raises:
            subprocess.TimeoutExpired: The process still runs.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired([], timeout or 0.0)
            self._owner.receive(left)
        return self.returncode or 0

    def terminate(self) -> None:
        """Ask the process to end."""
        os.kill(self.pid, signal.SIGTERM)


class ForkedProcesses:
    """Forks the processes of one script's sites. Use it from one thread, with `SiteProcesses`, which ends them.

    Args:
        imports: What the script imports first.
        path: First folder of the module search path, as Python gives it to the script.
        environment: Environment variables that all of the processes have in common.

    Raises:
        OSError: The process that forks cannot be started.
    """

    def __init__(self, imports: leading_imports.Imports, path: str, environment: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair()
        with theirs, interrupts_held():
            self._server = subprocess.Popen(
                [sys.executable, fork_server.__file__, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        self.pid = self._server.pid
        self._answers = selectors.DefaultSelector()
        self._answers.register(self._link, selectors.EVENT_READ)
        self._received = b""
        self._ready = self._over = False
        self._started: list[int] = []
        self._processes: dict[int, ForkedProcess] = {}
        self._send({"imports": imports, "path": path})

    @classmethod
    def of(cls, command: Sequence[str], environment: Mapping[str, str]) -> ForkedProcesses | None:
        """Return what forks the processes of this command.

        Args:
            command: The command line of the sites.
            environment: Environment variables that they have in common.

        Returns:
            None if each process must start by itself: on other systems than Linux, for commands that are no Python
            script, and for scripts that do anything before they import what takes long.
        """
        if sys.platform != "linux" or command[:1] != [sys.executable]:
            return None
        if command[1] == "-m":
            imports, path = leading_imports.of_module(command[2]), os.getcwd()
        else:
            imports, path = leading_imports.of_script(Path(command[1])), str(Path(command[1]).resolve().parent)
        if not imports:
            return None
        try:
            return cls(imports, path, environment)
        except OSError:
            return None

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkedProcess | None:
        """Fork a process. The first call waits until the imports are done.

        Args:
            command: The command line, of the same script as ever.
            environment: The complete environment of the process.
            log: File that stdout and stderr are appended to.

        Returns:
            The process; None if the process that forks is gone.
        """
        while not self._ready and not self._over:
            self.receive(None)
        log.touch()  # there from the beginning, as it is for a process that is started by itself
        module = command[1] == "-m"
        order = {
            "script": list(command[2:] if module else command[1:]),
            "module": module,
            "environment": dict(environment),
            "log": os.path.abspath(log),
        }
        with interrupts_held():
            self._send(order)
            while not self._started and not self._over:
                self.receive(None)
        if not self._started:
            return None
        return self._processes[self._started.pop()]

    def receive(self, timeout_s: float | None) -> None:
        """Take note of what has started and ended, after waiting for it for at most this long; None: without limit."""
        if self._over or not self._answers.select(timeout_s):
            return
        received = self._link.recv(2**16)
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._note(json.loads(line))
        if not received:  # nobody can tell how they end; `SiteProcesses` kills what is left of them
            self._over = True
            for process in self._processes.values():
                process.returncode = -signal.SIGKILL
            self._processes.clear()

    def close(self) -> None:
        """End the process that forks. Those that it has forked are left alone."""
        self._answers.close()
        self._link.close()
        self._over = True
        try:
            self._server.wait(_PATIENCE_S if self._ready else 0.0)
        except subprocess.TimeoutExpired:  # it is still importing
            self._server.kill()
            self._server.wait()

    def _note(self, message: dict[str, Any]) -> None:
        if number := message.get("started"):
            self._processes[number] = ForkedProcess(number, self)
            self._started.append(number)
        elif number := message.get("ended"):
            self._processes.pop(number).returncode = message["status"]
        else:
            self._ready = True

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._over = True
