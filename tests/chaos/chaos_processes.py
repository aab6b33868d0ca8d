"""The processes of a run under faults, and what every kind of run does with them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from chaos_disk import Disk
from chaos_plan import Fault

import fl_adapters

_PACKAGES = str(Path(fl_adapters.__file__).parents[1])
_LAST_WORDS_S = 5.0
_LOOK_S = 0.01


class ChaosError(AssertionError):
    """The run under faults did something that it must not do; the message has the ends of the logs."""


class Process:
    """A process that is started again and again with the same command, with all output in one log."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name, self._command, self._environment, self.log = name, list(command), environment, log
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] = open(log, "ab")  # noqa: SIM115 (closed by close)
        self.kills = 0
        self.lies_dead = False  # killed, and not started again yet

    def start(self) -> None:
        self.lies_dead = False
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output
        )

    @property
    def status(self) -> int | None:
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self.kills += 1
        self.lies_dead = True
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, timeout_s: float) -> None:
        """End the process by SIGTERM. Raises ChaosError if it takes too long, or says that it has failed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.dump()
            status = None
        if status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise ChaosError(f"{self.name} did not stop well (status {status}):\n{self.tail()}")

    def dump(self) -> None:
        """Have the process write its threads' stacks to its log, and end."""
        if self._process and self.status is None:
            self._process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_S)

    def close(self) -> None:
        if self._process and self.status is None:
            self.kill()
        self._output.close()

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def environment_of() -> dict[str, str]:
    """The environment of every process of a run under faults."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_PACKAGES, os.environ.get("PYTHONPATH", "")])}
    return environment | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class FaultyRun:
    """One run in `folder`, whose server keeps its files on `disk`.

    Attributes:
        server: The process of the server, which a full disk may end.
        sites: The processes of the sites.
        counts: Number of faults by kind.
    """

    server: Process
    sites: list[Process]

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self.disk = folder, disk
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._filled = False  # the disk has been, since the server ended the last time

    @property
    def processes(self) -> list[Process]:
        return [self.server, *self.sites]

    def start(self) -> None:
        for process in self.processes:
            process.start()

    def watch(self) -> None:
        """Raise ChaosError if a process has ended on its own. Only a full disk may end the server."""
        with self._lock:
            for process in self.processes:
                if process.lies_dead or process.status is None or (process.status == 0 and self.may_end):
                    continue
                if process is self.server and self._filled:
                    self._ended_by_the_disk()
                    continue
                raise ChaosError(f"{process.name} ended with status {process.status}:\n{process.tail()}")

    @property
    def may_end(self) -> bool:
        """Whether processes end by themselves once their work is done."""
        return False

    def _ended_by_the_disk(self) -> None:
        """Start a server again that a full disk has ended."""
        self.counts["(the full disk ended the server)"] += 1
        self._filled = False
        self.server.start()

    def _fill(self, fault: Fault) -> None:
        """Fill the server's disk for a while."""
        with self._lock:
            if self.server.status is not None:
                return
            self._filled = True
            self.disk.fill(self.server.pid)
        self.counts["fill the disk"] += 1
        end = time.monotonic() + fault.for_s
        while self.server.status is None and time.monotonic() < end:
            time.sleep(_LOOK_S)
        with self._lock:
            self.disk.free(self.server.pid if self.server.status is None else None)
            self.watch()

    def hangs(self, what: str, lines: int) -> ChaosError:
        """Have all processes write their threads' stacks and end. Returns the error."""
        for process in self.processes:
            process.dump()
        ends = "\n".join(f"-- {process.name}:\n{process.tail(lines)}" for process in self.processes)
        return ChaosError(f"{what}\n{ends}")

    def close(self) -> None:
        for process in self.processes:
            process.close()
