"""Command `fl-adapters server`: serves a federation until it is stopped, or runs one job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fl_adapters.cli.federation.failover import serve_in_turn
from fl_adapters.cli.live import live_runs
from fl_adapters.cli.log_lines import STDERR, LogOptions, say, written_lines
from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.environments.listeners import FanOut
from fl_adapters.environments.progress import ProgressLines, counted
from fl_adapters.environments.remote import job_fields
from fl_adapters.environments.tracking.server import ServerTracking
from fl_adapters.extras import needs_metrics_extra, needs_trust_extra
from fl_adapters.job import Job
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.store.stores import Storage
from fl_runtime.transport.malloc import use_one_arena
from fl_runtime.transport.tls_setting import only_tls_1_3
from fl_runtime.transport.turns import MEMORY_MIB
from fl_runtime.types import RunSettings

if TYPE_CHECKING:
    from fl_adapters.cli.monitoring.server_metrics import ServerMetrics
    from fl_runtime.server.federation.federation import FederationServer
    from fl_runtime.trust.identity import Identity
    from fl_runtime.trust.kits import StartupKit

_LOOK_S = 0.2


def run(
    kit_folder: Path,
    data: Path | None,
    listen: str,
    job_file: Path | None,
    syslog: str,
    metrics: str,
    as_json: bool,
    store_file: Path | None = None,
    log: LogOptions = STDERR,
    track: tuple[str, ...] = (),
    memory_mib: int = MEMORY_MIB,
) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the job of `job_file` ends. Raises the error of that job if it failed."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.server.federation.federation import FederationServer
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.working_kit import working_kit

        folder = data_folder(kit_folder, data)
        is_new = not folder.exists()
        kit = read_kit(working_kit(kit_folder, folder), kind="server")
        if data is None and is_new:
            _check_for_jobs_elsewhere(folder, kit.identity.federation)
        only_tls_1_3()  # before gRPC is used
        use_one_arena()
        _raise_file_limit()
        job = None if job_file is None else Job.from_file(job_file)
        tracking = ServerTracking((*track, *(job.track if job else ())), say)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())

        console = Console(stderr=True, markup=False, emoji=False)
        with (
            live_runs(console) if log.style == "text" else nullcontext() as runs,
            written_lines(kit.identity.name, log),
            _pages(metrics, kit, folder, shares_store=store_file is not None) as watched,
        ):
            counted_rounds = watched.rounds if watched else None

            def serve(storage: Storage, may_go_on: Callable[[], bool]) -> int | None:
                server = FederationServer(
                    kit,
                    folder,
                    read_job,
                    listen=listen,
                    listener_of=lambda name: FanOut(
                        (
                            *((counted_rounds,) if counted_rounds else ()),
                            *((runs.view_of(name),) if runs else ()),
                            tracking.listener_of(server.queue.record(name)),
                            ProgressLines(partial(say, job=name)),
                        )
                    ),
                    syslog=syslog,
                    storage=storage,
                    memory_mib=memory_mib,
                )
                try:
                    with watched.serving(server) if watched else nullcontext():
                        goes_on = lambda: not stop.wait(_LOOK_S)  # noqa: E731
                        return _serve(server, kit, folder, job, goes_on, may_go_on, tracking, as_json)
                finally:
                    server.close()
                    tracking.close()

            if store_file is None:
                return serve(Storage(), lambda: True) or 0
            on_trouble = watched.state.report if watched else _ignore
            return serve_in_turn(store_file, kit, folder, stop, serve, on_trouble)


def _serve(
    server: FederationServer,
    kit: StartupKit,
    data: Path,
    job: Job | None,
    goes_on: Callable[[], bool],
    may_go_on: Callable[[], bool],
    tracking: ServerTracking,
    as_json: bool,
) -> int | None:
    """Serve until the process is stopped or the job has ended; returns its exit status, or None if it may not go on."""
    address = server.start()
    where = f"serving at {address} as {kit.address}, data in {data}"
    say(f"{kit.identity.federation}: {where}")
    if kit.certificate.expires_soon:
        say(f"the certificate expires in {kit.certificate.days_left():.0f} days", warning=True)
    told = {record.name for record in server.queue.records() if record.ended}
    name = None if job is None else _start_job(server, job, kit.identity)
    going_on = True
    while going_on:
        going_on = goes_on()
        if not may_go_on():
            return None
        if server.queue.halted:
            raise server.queue.halted
        ended = {record.name: record for record in server.queue.records() if record.ended}
        for item, record in ended.items():
            if item not in told:
                outcome = server.outcome(item)
                say(_summary(outcome, with_error=item != name), item, warning=bool(outcome["error"]))
                tracking.end(record, data / item)
        told = set(ended)  # one that is resumed is told again
        if name in told:
            return _finish(server.outcome(name), as_json)
    return 0


@contextmanager
def _pages(address: str, kit: StartupKit, data: Path, *, shares_store: bool) -> Iterator[ServerMetrics | None]:
    """Serve the pages of monitoring for the block, also while the process stands by; none without an address."""
    if not address:
        yield None
        return
    with needs_metrics_extra():
        from fl_adapters.cli.monitoring.page import MonitoringPages
        from fl_adapters.cli.monitoring.server_metrics import ServerMetrics
    watched = ServerMetrics(kit.folder, data, shares_store=shares_store)
    with closing(MonitoringPages(address, watched.page, watched.health.faults, watched.state.text)) as pages:
        say(f"metrics at http://{pages.address}/metrics")
        yield watched


def _ignore(trouble: str) -> None:
    """Tell nobody of a trouble that the log has."""


def data_folder(kit: Path, chosen: Path | None) -> Path:
    """Return the data folder of a server.

    Args:
        kit: Folder of the server's startup kit.
        chosen: The folder that the user named, or None.

    Returns:
        The chosen one; else the folder beside the kit with "-data" after its name.
    """
    return (chosen or kit.resolve().with_name(f"{kit.resolve().name}-data")).resolve()


def _check_for_jobs_elsewhere(folder: Path, federation: str) -> None:
    """Refuse to begin with an empty folder if an earlier version left jobs in the working directory."""
    from fl_runtime.server.federation.archive import jobs_of

    earlier = Path("runs").resolve()
    if not (jobs := jobs_of(earlier, federation)):
        return
    raise ConfigError(
        f"an earlier version left jobs of {federation} here: {', '.join(jobs[:5])}",
        where=str(earlier),
        fix=f"go on with them by `--data {earlier}`, or move the folder to {folder}",
    )


def _start_job(server: FederationServer, job: Job, identity: Identity) -> str:
    """Submit the file's job, or continue it if an earlier server left it waiting or running. Returns its name."""
    chosen = "name" in job.model_fields_set
    for record in server.queue.records():
        if not record.ended and (record.name == job.name or not chosen):
            return record.name
    return server.submit(job_fields(job), identity)


def _summary(outcome: Mapping[str, Any], *, with_error: bool) -> str:
    """One line about a job that has ended. `with_error` adds its error, for jobs whose error is not shown otherwise."""
    if outcome["error"]:
        state = f"failed: {outcome['error']['what']}" if with_error else "failed"
    else:
        best = f", the best was round {outcome['best_round']}" if outcome["best_round"] else ""
        if outcome.get("no_best"):
            best = f", none is the best ({outcome['no_best']})"
        state = f"{counted(len(outcome['rounds']), 'round')}{best}"
    return f"{state}; results in {outcome['folder']}"


def _finish(outcome: Mapping[str, Any], as_json: bool) -> int:
    if as_json:
        show_json(outcome)
    if outcome["error"]:
        raise FederationError.from_wire(outcome["error"])
    return 0


def read_job(fields: Mapping[str, Any], known: Sequence[str]) -> RunSettings:
    """The settings of a submitted job, checked like those of a job file.

    Args:
        fields: Fields of the job, as `job_fields` gives them.
        known: Names of the project's sites.

    Returns:
        The settings.

    Raises:
        ConfigError: The fields are not those of a job, or its sites are not in this federation.
    """
    try:
        job = Job(**{str(name): value for name, value in fields.items()})
    except TypeError as error:
        raise ConfigError(
            f"these are not the fields of a job: {error}", fix="submit it with `fl_adapters.Production`"
        ) from None
    if job.track:
        raise ConfigError(
            f"a job cannot make the server track it by {job.track[0]}",
            where="track",
            fix="leave track out of the job, and track it from your machine: fl-adapters job follow JOB --track ...",
        )
    sites = tuple(known) if job.sites is None or job.sites == len(known) else job.sites
    if isinstance(sites, int):
        raise ConfigError(
            f"the job is for {sites} sites, the federation has {len(known)}", where="sites", fix="name the sites"
        )
    unknown = [name for name in sites if name not in known]
    if unknown:
        raise ConfigError(
            f"not in this federation: {', '.join(unknown)}", where="sites", fix=f"its sites are {', '.join(known)}"
        )
    return job.settings(sites)


def _raise_file_limit() -> None:
    """Allow as many open files as the system permits, so that idle connections of strangers cannot keep sites out."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
