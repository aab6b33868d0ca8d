"""Runs a whole federation on this machine as in production: separate processes, mutual TLS and startup kits."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from fl_adapters.environments.listeners import FanOut, RunTracker
from fl_adapters.environments.local import (
    LocalRun,
    SimulationResult,
    follow,
    make_result,
    script_command,
    select_sites,
    site_processes,
    starting_event,
)
from fl_adapters.environments.logs import tail
from fl_adapters.environments.processes import SiteProcesses, free_ports, site_environment
from fl_adapters.environments.processes.gpus import visible_devices
from fl_adapters.environments.progress.notebook import progress_listener
from fl_adapters.environments.remote import RemoteJob
from fl_adapters.environments.starting.local_environment import LocalEnvironment
from fl_adapters.environments.starting.site_data import places_of
from fl_adapters.environments.tracking import Tracking
from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.extras import needs_trust_extra
from fl_adapters.job import Job
from fl_adapters.participant.kit import KIT_VARIABLE
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError
from fl_runtime.types import Listener

_ADMIN = "admin"
_START_S = 30.0
_PATIENCE_S = 10.0
_QUORUM_S = 60.0  # on one machine, a site that is gone for longer does not come back
_CLI = (sys.executable, "-m", "fl_adapters.cli")


@dataclass(frozen=True)
class ProofOfConcept(LocalEnvironment):
    """Runs a job on this machine as in production: real server and site commands, startup kits and mutual TLS.

    A federation is provisioned into a temporary folder. Then `fl-adapters server` and, for each site,
    `fl-adapters run` with the job's app start as processes of their own. Needs the extra `[trust]`.

    Attributes:
        sites: Number of sites, or their names. None takes the job's sites, else those of `data`, else three.
        args: Arguments of the script.
        module: Whether the job's app is a module to run with `python -m`.
        gpus: CUDA devices that the sites get in turn, counted within `CUDA_VISIBLE_DEVICES` where that is set. Empty
            leaves the variable alone.
        folder: Folder that the run's own folder, named after the job, is made in.
        port: TCP port of the server; 0 takes a free one.
        listeners: Functions that are called with each `Event`, one at a time, from other threads.
        quiet: Print nothing. Otherwise one line per round goes to stderr.
        data: Where the data of each site lie, as for a `Simulation`. Each site's policy says it, as in production.
        trackers: Where the run is tracked, beside the job's `track`; see `Simulation`.

    Example:
        >>> result = Job(app="train.py", rounds=5).run(ProofOfConcept(sites=3))
    """

    def run(self, job: Job) -> SimulationResult:
        """Run a job to its end. Ctrl-C ends all processes before it is raised again.

        Args:
            job: The job. Its `app` is the script that every site runs.

        Returns:
            The result of the finished run, as of a `Simulation`.

        Raises:
            FederationError: The run failed; the error names the cause.
        """
        began = time.monotonic()
        command = script_command(job, self.args, module=self.module)
        sites = select_sites(job, self.sites, self.data)
        data = places_of(self.data, sites)
        visible_devices(self.gpus)  # reports a GPU that is not there before anything is made
        trackers = make_trackers((*job.track, *self.trackers))
        folder = Path(self.folder).resolve()
        job = job.model_copy(update={"name": _free_name(folder, job), "sites": sites})
        printers: tuple[Listener, ...] = () if self.quiet else (progress_listener(),)
        tracker = RunTracker()
        params = job.model_dump(mode="json", exclude={"track"})
        tracking = Tracking(trackers, job.name, uuid.uuid4().hex, params)
        tell = FanOut((tracker, tracking, *self.listeners, *printers))
        run = LocalRun(job.settings(sites), folder / job.name, tracker, tell)
        with (
            tracking.until_the_end(run.folder),
            needs_trust_extra(),
            tempfile.TemporaryDirectory(prefix="fl-adapters-poc-") as temporary,
        ):
            kits = Path(temporary)
            address = f"127.0.0.1:{self.port or free_ports(1)[0]}"
            _provision(kits, sites, address, data)
            with _server(kits, folder) as control:
                tell(starting_event(run, command))
                remote = RemoteJob(control, job, tell, _PATIENCE_S)
                with site_processes(remote, run, command, gpus=self.gpus) as processes:
                    self._start_sites(processes, command, run, kits)
                    exits = follow(remote, processes, run)
                    return make_result(remote, run, exits, began)

    def _start_sites(self, processes: SiteProcesses, command: list[str], run: LocalRun, kits: Path) -> None:
        sites = run.settings.sites
        ports, gpus = free_ports(len(sites)), visible_devices(self.gpus)
        for index, site in enumerate(sites):
            gpu = gpus[index % len(gpus)] if gpus else None
            environment = site_environment(kits / site, len(sites), ports[index], gpu)
            ours = [*_CLI, "run", "--kit", str(kits / site), "--results", str(run.folder), "--", *command]
            processes.start(site, ours, environment, run.log(site))


def _provision(kits: Path, sites: Sequence[str], address: str, data: Mapping[str, str]) -> None:
    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.kits import write_kit
    from fl_runtime.trust.policy import POLICY_FILE
    from fl_runtime.trust.project import AdminEntry, Project, ServerEntry, SiteEntry

    for taken in {"server", "authority", _ADMIN} & set(sites):
        raise ConfigError(f"a site of a proof of concept cannot be called {taken!r}", where="sites", fix="rename it")
    project = Project(
        federation="proof-of-concept",
        server=ServerEntry(address=address, listen=address),
        sites=tuple(SiteEntry(name=name, organisation=name) for name in sites),
        admins=(AdminEntry(name=_ADMIN, organisation="proof-of-concept", role="project-admin"),),
        patience_s=_QUORUM_S,
        days=30,
    )
    authority = Authority.create(kits / "authority", project)
    for identity in project.participants():
        write_kit(kits / identity.name, authority, identity)
    for name in sites:  # all data are this user's own, and any job may be tried, also with one site or cyclic
        own = yaml.safe_dump({"data": data[name]}, allow_unicode=True) if name in data else ""
        (kits / name / POLICY_FILE).write_text(f"# A proof of concept limits nothing.\n{own}", encoding="utf-8")


@contextmanager
def _server(kits: Path, folder: Path) -> Iterator[ControlClient]:
    """Run the server's process during this block, and connect to it as the admin."""
    log = kits / "server.log"
    environment = {name: value for name, value in os.environ.items() if name != KIT_VARIABLE}
    command = [*_CLI, "server", "--kit", str(kits / "server"), "--data", str(folder)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        control = _connect(kits, process, log)
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


def _connect(kits: Path, process: subprocess.Popen[bytes], log: Path) -> ControlClient:
    """Wait until the server answers. Raises SiteFailedError with the end of its log if it does not start."""
    from fl_runtime.trust.kits import read_kit

    kit = read_kit(kits / _ADMIN)
    control = ControlClient.of_kit(kit.folder, kit.addresses)
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
            lines = "\n".join(f"    | {line}" for line in tail(log)) or f"    | {error}"
            raise SiteFailedError(f"the server did not start:\n{lines}", fix="correct the error above") from None


def _free_name(folder: Path, job: Job) -> str:
    """The job's name. A default name that is taken gets a number; a chosen one is an error."""
    if "name" in job.model_fields_set and (folder / job.name).exists():
        raise ConfigError(
            f"{folder / job.name} exists already, from an earlier run",
            where="name",
            fix="choose another name for the job, or delete that folder",
        )
    names = (job.name if number == 1 else f"{job.name}-{number}" for number in itertools.count(1))
    return next(name for name in names if not (folder / name).exists())
