"""A whole federation on this machine, as it would be in production: separate processes, mutual TLS, startup kits."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.extras import needs_cryptography
from fl_adapters.environments.local import (
    LocalRun,
    SimulationResult,
    follow,
    result_of,
    script_command,
    site_processes,
    sites_of,
    starting,
)
from fl_adapters.environments.processes import SiteProcesses, free_ports, site_environment, tail
from fl_adapters.environments.progress import ProgressLines
from fl_adapters.environments.remote import RemoteJob
from fl_adapters.environments.watch import FanOut, Watch
from fl_adapters.job import Job
from fl_adapters.participant.kit import KIT_VARIABLE
from fl_runtime.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.types import Listener

_ADMIN = "admin"
_START_S = 30.0
_PATIENCE_S = 10.0
_CLI = (sys.executable, "-m", "fl_adapters.cli")


@dataclass(frozen=True)
class ProofOfConcept:
    """Provisions a federation into a temporary folder, then starts `fl-adapters server` and, for each site,
    `fl-adapters run` with the job's app, all as processes of their own that talk over mutual TLS.

    The arguments are those of Simulation, and so is the result.
    """

    sites: int | Sequence[str] | None = None
    args: Sequence[str] = ()
    module: bool = False
    gpus: Sequence[str | int] = ()
    folder: str | Path = "runs"
    port: int = 0
    listeners: Sequence[Listener] = ()
    quiet: bool = False

    def run(self, job: Job) -> SimulationResult:
        """Run `job` to its end. Raises FederationError if it fails; Ctrl-C ends all processes first."""
        began = time.monotonic()
        command = script_command(job, self.args, module=self.module)
        sites = sites_of(job, self.sites)
        folder = Path(self.folder).resolve()
        job = job.model_copy(update={"name": _free_name(folder, job), "sites": sites})
        shown: tuple[Listener, ...] = () if self.quiet else (ProgressLines(sys.stderr),)
        watch = Watch()
        tell = FanOut((watch, *self.listeners, *shown))
        run = LocalRun(job.settings(sites), folder / job.name, watch, tell)
        with needs_cryptography(), tempfile.TemporaryDirectory(prefix="fl-adapters-poc-") as temporary:
            kits = Path(temporary)
            address = f"127.0.0.1:{self.port or free_ports(1)[0]}"
            _provision(kits, sites, address)
            with _server(kits, folder) as control:
                tell(starting(run, command))
                remote = RemoteJob(control, job, tell, _PATIENCE_S)
                with site_processes(remote, run) as processes:
                    self._start_sites(processes, command, run, kits)
                    exits = follow(remote, processes, run)
                    return result_of(remote, run, exits, began)

    def _start_sites(self, processes: SiteProcesses, command: list[str], run: LocalRun, kits: Path) -> None:
        sites = run.settings.sites
        ports = free_ports(len(sites))
        for index, site in enumerate(sites):
            gpu = str(self.gpus[index % len(self.gpus)]) if self.gpus else None
            environment = site_environment(kits / site, len(sites), ports[index], gpu)
            ours = [*_CLI, "run", "--kit", str(kits / site), "--results", str(run.folder), "--", *command]
            processes.start(site, ours, environment, run.log(site))


def _provision(kits: Path, sites: Sequence[str], address: str) -> None:
    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.kits import write_kit
    from fl_runtime.trust.project import AdminEntry, Project, ServerEntry, SiteEntry

    for taken in {"server", "authority", _ADMIN} & set(sites):
        raise ConfigError(f"a site of a proof of concept cannot be called {taken!r}", where="sites", fix="rename it")
    project = Project(
        federation="proof-of-concept",
        server=ServerEntry(address=address, listen=address),
        sites=tuple(SiteEntry(name=name, organisation=name) for name in sites),
        admins=(AdminEntry(name=_ADMIN, organisation="proof-of-concept", role="project-admin"),),
        days=30,
    )
    authority = Authority.create(kits / "authority", project)
    for identity in project.participants():
        write_kit(kits / identity.name, authority, identity)


@contextmanager
def _server(kits: Path, folder: Path) -> Iterator[ControlClient]:
    """The server's process, and an admin's line to it. SiteFailedError with its last words if it does not start."""
    log = kits / "server.log"
    environment = {name: value for name, value in os.environ.items() if name != KIT_VARIABLE}
    command = [*_CLI, "server", "--kit", str(kits / "server"), "--folder", str(folder)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        control = _reached(kits, process, log)
        try:
            yield control
        finally:
            control.close()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reached(kits: Path, process: subprocess.Popen[bytes], log: Path) -> ControlClient:
    from fl_runtime.trust.kits import read_kit

    kit = read_kit(kits / _ADMIN)
    control = ControlClient.of_kit(kit.folder, kit.address)
    deadline = time.monotonic() + _START_S
    while True:
        try:
            control.ask("Status")
            return control
        except FederationError as error:
            if process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            control.close()
            said = "\n".join(f"    | {line}" for line in tail(log)) or f"    | {error}"
            raise SiteFailedError(f"the server did not start:\n{said}", fix="correct what it says") from None


def _free_name(folder: Path, job: Job) -> str:
    """The job's name, with a number if it is taken and nobody chose it."""
    if "name" in job.model_fields_set and (folder / job.name).exists():
        raise ConfigError(
            f"{folder / job.name} exists already, from an earlier run",
            where="name",
            fix="choose another name for the job, or delete that folder",
        )
    names = (job.name if number == 1 else f"{job.name}-{number}" for number in itertools.count(1))
    return next(name for name in names if not (folder / name).exists())
