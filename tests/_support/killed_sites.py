"""Sites in their own processes, killed with SIGKILL and started again with the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import fl_adapters
from fl_adapters.testing import LocalFederation, Place

TIMEOUT_S = 120


class Process(Protocol):
    """A site's process: the part of `subprocess.Popen` that is used here."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def run_sites(
    folder: Path, script: Path, *, warm: WarmProcess | None = None, kills: int = 0, seed: int = 0, **settings: Any
) -> bytes:
    """Run `script` at two sites under `exact_restart`; return the file of the final global model.

    Args:
        warm: Process whose forks run the script; None runs it in a fresh Python.
        kills, seed: As in `killed`.
    """

    def start(place: Place) -> Process:
        log = folder / f"{place.name}.log"
        return warm.start(script, place.kit, log) if warm else _started(place, script, log)

    with LocalFederation(sites=2, sockets=True, folder=folder, **{"exact_restart": True, **settings}) as federation:
        killed(federation, start, settings["rounds"], kills, seed)
        exported = federation.server.export(folder / "final")
        assert exported is not None
        return exported.read_bytes()


class WarmProcess:
    """A process that has imported the given modules and forks sites, each of which starts within milliseconds."""

    def __init__(self, *modules: str, **environment: str) -> None:
        command = [sys.executable, str(Path(__file__).parent / "warm_process.py"), *modules]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=_environment() | environment, **pipes)

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # its input ends, and so does it

    def start(self, script: Path, kit: str, log: Path) -> Process:
        return _Forked(self, self.ask({"script": str(script), "kit": kit, "log": str(log)}))

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class _Forked:
    def __init__(self, warm: WarmProcess, pid: int) -> None:
        self._warm, self._pid = warm, pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._warm.ask({"status": self._pid})
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (TIMEOUT_S if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a site", timeout or TIMEOUT_S)
            time.sleep(0.005)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)


def killed(federation: LocalFederation, start: Callable[[Place], Process], rounds: int, kills: int, seed: int) -> None:
    """Run both sites to a good end while killing them `kills` times.

    The killed site is started again with `start`. `seed` decides the rounds of the kills and the moments within them.
    """
    processes = {place.name: start(place) for place in federation.places}
    try:
        for site, ready, moment_s in _plan(federation, kills, seed, rounds):
            _wait(processes[site.name], site, ready)
            try:
                processes[site.name].wait(moment_s)
            except subprocess.TimeoutExpired:
                processes[site.name].kill()
                processes[site.name].wait()
                processes[site.name] = start(site)
        statuses = [process.wait(TIMEOUT_S) for process in processes.values()]
        logs = "".join(path.read_text() for path in federation.folder.rglob("*log*") if path.is_file())
        assert statuses == [0, 0], logs
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert len(federation.result().rounds) == rounds
    joined = sum(event.kind == "joined" for event in federation.events)
    assert joined > 2 or not kills, "nobody was killed after it had joined"


def _plan(
    federation: LocalFederation, kills: int, seed: int, rounds: int
) -> Sequence[tuple[Place, Callable[[], bool], float]]:
    """Return, for each kill, which site, in which round, and how many seconds after the round began."""
    rng = np.random.default_rng(seed)

    def in_round(site: str, number: int) -> Callable[[], bool]:
        return lambda: any(
            event.kind == "task_sent" and event.site == site and event.round >= number
            for event in list(federation.events)
        )

    chosen = sorted(rng.integers(0, rounds, kills).tolist())  # round 0: the initial model
    sites = [federation.places[int(index)] for index in rng.integers(0, 2, kills)]
    return [
        (site, in_round(site.name, number), float(rng.exponential(0.05)))
        for site, number in zip(sites, chosen, strict=True)
    ]


def _wait(process: Process, site: Place, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not ready() and process.poll() is None:
        assert time.monotonic() < end, f"{site.name} did not come so far"
        time.sleep(0.002)


def _started(place: Place, script: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = _environment() | {"FL_ADAPTERS_KIT": place.kit}
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent
        )


def _environment() -> dict[str, str]:
    packages = str(Path(fl_adapters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
