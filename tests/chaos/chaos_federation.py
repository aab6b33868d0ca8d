"""The processes of one run: a server, sites and a proxy before each, and the effect of each fault on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from chaos_disk import Disk
from chaos_plan import Fault
from chaos_targets import HERE, Target
from tcp_proxy import TcpProxy

import fl_adapters
from fl_adapters.environments.processes import free_ports
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_runtime.types import RunSettings

_PACKAGES = str(Path(fl_adapters.__file__).parents[1])
_FIRES_S = 3.0
_LAST_WORDS_S = 5.0
_EXIT_S = 90.0  # of an interpreter with a framework in it, on a busy machine


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


class Federation:
    """One run of a target in `folder`; the server's files are on `disk`."""

    def __init__(self, target: Target, folder: Path, disk: Disk) -> None:
        self.target, self.folder, self.disk = target, folder, disk
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._filled = False  # the disk has been, since the server ended the last time
        port = free_ports(1)[0]
        names = tuple(f"site-{index + 1}" for index in range(target.sites))
        fields: dict[str, Any] = {"name": "chaos", "sites": names, "min_sites": len(names), "rounds": target.rounds}
        fields |= {"deadline_s": 1800.0, "rejoin_s": 900.0}  # beyond a restart on a machine that is busy
        self.settings = RunSettings(**{**fields, "exact_restart": True, **target.settings})
        environment = environment_of()
        command = [
            sys.executable,
            str(HERE / "server.py"),
            str(disk.folder),
            str(port),
            json.dumps(asdict(self.settings)),
        ]
        self.server = Process("server", command, environment, folder / "server.txt")
        self.proxies = [TcpProxy(f"127.0.0.1:{port}") for _ in names]
        self._met = [0] * len(names)  # connections of earlier processes of each site
        self.sites = []
        for index, name in enumerate(names):
            own = folder / name
            kit = Kit(
                "chaos", name, index, len(names), self.proxies[index].address, f"secret of {name}", patience_s=20.0
            )
            kit.save(own / "kit")
            self.sites.append(
                Process(name, target.command, {**environment, KIT_VARIABLE: str(own / "kit")}, own / "log.txt")
            )

    def start(self) -> None:
        for process in (self.server, *self.sites):
            process.start()

    def gather(self, timeout_s: float) -> None:
        """Wait until every started site has connected to the server, so that its script's imports are over."""
        end = time.monotonic() + timeout_s
        while not self.over and (
            late := [site for site, absent in zip(self.sites, self._absent(), strict=True) if absent]
        ):
            self.watch()
            if time.monotonic() > end:
                self._hangs(late)
            time.sleep(0.02)

    def _absent(self) -> list[bool]:
        zipped = zip(self.sites, self.proxies, self._met, strict=True)
        return [site.status is None and proxy.connections == met for site, proxy, met in zipped]

    @property
    def over(self) -> bool:
        """Whether the server has ended well."""
        return self.server.status == 0

    def watch(self) -> None:
        """Raise ChaosError if a process has failed on its own. Only a full disk may end the server."""
        with self._lock:
            for process in (self.server, *self.sites):
                if process.status not in (None, 0) and not process.lies_dead:
                    if process is self.server and self._filled:
                        self._ended_by_the_disk()
                        continue
                    raise ChaosError(f"{process.name} ended with status {process.status}:\n{process.tail()}")

    def _ended_by_the_disk(self) -> None:
        """Start a server again that a full disk has ended, once there is room.

        The server must have said so in a message of ours; else ChaosError.
        """
        if self.disk.full:
            return
        if self.disk.mounted:  # else the limit was on its log too
            words = json.loads(self.server.log.read_text(errors="replace").splitlines()[-1])
            if words["code"] != "store" or not (words["where"] and words["fix"]):
                raise ChaosError(f"the server ended for want of disk and said: {words}")
        self.counts["(the full disk ended the server)"] += 1
        self._filled = False
        self.server.start()

    def suffer(self, fault: Fault) -> None:
        """Make a fault happen, and return once everything that it ended is running again."""
        number = fault.site % len(self.sites)
        site, proxy = self.sites[number], self.proxies[number]
        before = proxy.fired
        match fault.kind:
            case "kill the server":
                self._killed(self.server, fault)
            case "kill a site":
                self._killed(site, fault)
            case "delay a connection":
                proxy.hold(fault.for_s)
                self._count(fault)
            case "silence a connection":
                proxy.deafen()
                self._count(fault)
            case "cut a connection":
                proxy.cut_after(fault.direction, fault.at_bytes)  # type: ignore[arg-type]
            case "damage a byte":
                proxy.damage_after(fault.direction, fault.at_bytes, fault.flip)  # type: ignore[arg-type]
            case "fill the disk":
                self._fill(fault)
        if fault.kind in ("cut a connection", "damage a byte"):
            end = time.monotonic() + _FIRES_S
            while not (fired := proxy.wait_fired(before + 1, 0.1)) and time.monotonic() < end and not self.over:
                pass
            if fired:
                self._count(fault)

    def _killed(self, process: Process, fault: Fault) -> None:
        with self._lock:
            if process.status is not None or self.over:
                return
            process.kill()
            self._met = [
                proxy.connections if site is process else met
                for site, proxy, met in zip(self.sites, self.proxies, self._met, strict=True)
            ]
        self._count(fault)
        time.sleep(fault.for_s)
        with self._lock:
            if not self.over:
                process.start()

    def _fill(self, fault: Fault) -> None:
        with self._lock:
            if self.server.status is not None:
                return
            self._filled = True
            self.disk.fill(self.server.pid)
        self._count(fault)
        end = time.monotonic() + fault.for_s
        while self.server.status is None and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            self.disk.free(self.server.pid if self.server.status is None else None)
            self.watch()

    def _count(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, timeout_s: float) -> None:
        """Wait for all processes to end. Raises ChaosError, with their threads' stacks, if they do not."""
        end, alone, over = time.monotonic() + timeout_s, 0.0, False
        while late := [process for process in (self.server, *self.sites) if process.status is None]:
            self.watch()
            now = time.monotonic()
            if self.over and not over:
                over, alone, end = True, now + _LAST_WORDS_S, now + _EXIT_S
            if over and now > alone and all(process.kills for process in late):
                return  # killed after its last word to the server, and started again after the end
            if now > end:
                self._hangs(late)
            time.sleep(0.02)

    def _hangs(self, late: Sequence[Process]) -> None:
        for process in (self.server, *self.sites):
            process.dump()
        ends = "\n".join(f"-- {p.name}:\n{p.tail(150)}" for p in (self.server, *self.sites))
        raise ChaosError(f"{', '.join(p.name for p in late)} did not end:\n{ends}")

    def close(self) -> None:
        for process in (self.server, *self.sites):
            process.close()
        for proxy in self.proxies:
            proxy.__exit__()

    def ended_well(self) -> Iterator[Path]:
        """The folders of the sites that stayed to the end."""
        for site in self.sites:
            own = self.folder / site.name
            if (own / "final.json").exists():
                yield own
            elif not site.kills:
                raise ChaosError(f"{site.name} has left no final model:\n{site.tail()}")
