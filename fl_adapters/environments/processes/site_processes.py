"""Starts, watches and ends the site processes of a simulation."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fl_adapters.environments.processes import orphans
from fl_adapters.environments.processes.forked_processes import ForkedProcesses
from fl_adapters.environments.processes.interrupts import interrupts_held
from fl_adapters.environments.processes.reaper import Reaper
from fl_adapters.participant.kit import KIT_VARIABLE

_POSIX = os.name == "posix"
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Process(Protocol):
    """The part of `subprocess.Popen` that a site's process needs."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired after `timeout` seconds."""
        ...

    def terminate(self) -> None:
        """Ask the process to end."""
        ...


@dataclass
class SiteProcess:
    """One site's process, with all that is needed to start it again. `log` receives its stdout and stderr."""

    site: str
    log: Path
    process: Process
    command: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Sequence[int] = ()


class SiteProcesses:
    """Site processes, each in a process group of its own. None of them outlives this process.

    Use it from one thread. On POSIX a small helper process (`orphans.py`) ends them if this process is killed.

    Args:
        descriptors: Open file descriptors that the helper process inherits, such as that of a lock, which is then held
            until all processes are gone.
        forked: What forks the processes, all of one script; None starts each with a Python of its own. Closed by
            `close`.
    """

    def __init__(self, descriptors: Sequence[int] = (), forked: ForkedProcesses | None = None) -> None:
        self._running: dict[str, SiteProcess] = {}
        self._over: dict[str, SiteProcess] = {}
        self._forked = forked
        self._reaper = Reaper(descriptors)
        if forked is not None:
            self._reaper.add(forked.pid)

    def start(
        self,
        site: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Run `command` in the current directory with an empty stdin.

        Args:
            site: Name of the site, by which the process is known here.
            command: The command line.
            environment: The complete environment of the process.
            log: File that stdout and stderr are appended to; its folder is made.
            descriptors: Open file descriptors that the process inherits.

        Raises:
            OSError: The command cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start(site, command, environment, log, descriptors)

    def start_again(self, site: str) -> None:
        """Start a site's ended process again, with the same command and log."""
        item = self._over.pop(site)
        self._start(site, item.command, item.environment, item.log, item.descriptors)

    def _start(
        self,
        site: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        descriptors: Sequence[int],
    ) -> None:
        forked = self._forked.start(command, environment, log) if self._forked is not None else None
        with interrupts_held():
            process = forked or _started(command, environment, log, descriptors)
            self._running[site] = SiteProcess(site, log, process, command, environment, descriptors)
            self._reaper.add(process.pid)

    def kill(self, site: str) -> None:
        """Kill a site's process at once; `ended` then reports it."""
        _signal_group(self._running[site].process, kill=True)

    @property
    def running(self) -> tuple[str, ...]:
        """Sites whose process `ended` has not reported yet."""
        return tuple(self._running)

    def ended(self) -> list[tuple[str, int]]:
        """(site, exit status) of the processes that ended since the last call. Status -N is death by signal N."""
        over: list[tuple[str, int]] = []
        for site, item in list(self._running.items()):
            if (status := item.process.poll()) is not None:
                over.append((site, status))
                self._over[site] = self._running.pop(site)
                _signal_group(item.process, kill=True)  # its remaining children, such as data loader workers
                self._reaper.remove(item.process.pid)
        return over

    def stop(self, grace_s: float) -> None:
        """Ask all processes to end, and kill those that still run after `grace_s` seconds.

        A KeyboardInterrupt meanwhile kills them at once. Returns when all are gone.
        """
        processes = [item.process for item in self._running.values()]
        family = orphans.descendants(process.pid for process in processes)
        try:
            for process in processes:
                _signal_group(process, kill=False)
            end = time.monotonic() + grace_s
            for process in processes:
                process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        for process in processes:
            _signal_group(process, kill=True)
        if family:
            orphans.send(family, signal.SIGKILL, single=True)
        for process in processes:
            process.wait()
        self.ended()

    def close(self) -> None:
        """Kill all remaining processes, then end the helper process."""
        self.stop(grace_s=0.0)
        if self._forked is not None:
            self._forked.close()
            self._reaper.remove(self._forked.pid)
        self._reaper.close()


def _started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:  # a restarted or resumed site keeps its earlier output
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=_POSIX,
            pass_fds=descriptors,
            creationflags=0 if _POSIX else subprocess.CREATE_NEW_PROCESS_GROUP,  # type: ignore[attr-defined,unused-ignore]
        )


def site_environment(kit: Path, sites: int, port: int, gpu: str | None) -> dict[str, str]:
    """This process's environment variables, with those that a simulated site needs. Settings of the user stay.

    Args:
        kit: Folder of the site's startup kit.
        sites: Number of sites that share this machine's cores.
        port: Free TCP port for the site's own distributed training (DDP).
        gpu: The only device that the site may use; None leaves `CUDA_VISIBLE_DEVICES` alone.

    Returns:
        The complete environment for the site's process.
    """
    # torchrun reads PET_MASTER_PORT if it is the site's command
    own = {KIT_VARIABLE: str(kit), "MASTER_PORT": str(port), "PET_MASTER_PORT": str(port)}
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpu
    return {**common_environment(sites), **own}


def common_environment(sites: int) -> dict[str, str]:
    """The part of `site_environment` that is the same for all of so many sites."""
    return {**thread_settings(sites), **os.environ}


def thread_settings(processes: int) -> dict[str, str]:
    """Environment variables that let this many processes share the machine's cores and GPUs."""
    return {
        **dict.fromkeys(_THREADS, str(max(1, available_cores() // processes))),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of the loopback that are free at this moment."""
    sockets = []
    try:
        for _ in range(count):
            sockets.append(socket.socket())
            sockets[-1].bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def describe_status(status: int) -> str:
    """Exit status in words, such as "exit status 1" or "killed by SIGKILL"."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _signal_group(process: Process, *, kill: bool) -> None:
    """Signal a process and all of its children that stayed in its process group."""
    if _POSIX:
        orphans.send([process.pid], signal.SIGKILL if kill else signal.SIGTERM)
    else:
        process.terminate()  # Windows has no gentler way
