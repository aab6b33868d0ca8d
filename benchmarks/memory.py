"""Measures the memory of server and sites over a long run, and the server's memory by the number of sites. Linux only.

    python benchmarks/memory.py soak [--rounds 2000] [--mib 4]
    python benchmarks/memory.py sites [--sites 2 8 64] [--mib 64] [--servers 5] [--plain]

`soak` runs one long simulation and compares its start with its end. `sites` runs several servers for each number of
sites, over gRPC with mutual TLS (`--plain`: without it, as in a simulation).

Columns: memory is a process's anonymous and shared memory in MiB. Mapped pages of files are a column of their own,
since the system reclaims them when it needs to. `soak` takes samples after rounds and counts open files and threads.
The workers of gRPC's thread pool, whose number varies, are a column of their own. `sites` shows the largest of samples
every 0.2 s through three rounds: the median, lowest and highest of its servers.

Ends with status 1 if memory grows by more than 5 %, if files or threads increase (by more than two gRPC workers), or if
the server's memory exceeds its budget.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kits import make_kits
from rich.console import Console
from rich.table import Table
from tree_memory import numbers

from fl_adapters import Job, Simulation
from fl_adapters.cli.federation.server import read_job
from fl_adapters.environments.remote import job_fields
from fl_runtime.client import SiteClient
from fl_runtime.server import Server
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.malloc import use_one_arena
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.transport.tls_setting import only_tls_1_3
from fl_runtime.transport.turns import MEMORY_MIB
from fl_runtime.trust.kits import read_kit
from fl_runtime.types import Event, RunSettings, Update
from fl_runtime.wire.manifest import Manifest

HERE = Path(__file__).parent
WARM = 50
ROUNDS = 3
PATIENCE_S = 900.0
EVERY_S = 0.2
ALLOWED = 1.05
MORE_WORKERS = 2


@dataclass(frozen=True)
class Sample:
    """Resources of one process at one moment.

    Attributes:
        own_mib: Anonymous and shared memory, in MiB.
        files_mib: Resident pages of mapped files, in MiB.
        open_files: Number of open file descriptors.
        threads: Number of threads without gRPC's workers.
        grpc_workers: Number of threads in gRPC's pool.
    """

    own_mib: float
    files_mib: float
    open_files: int
    threads: int
    grpc_workers: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        kib = defaultdict(int, numbers(Path(f"/proc/{pid}/smaps_rollup").read_text()))
        status = numbers(Path(f"/proc/{pid}/status").read_text())
        own = kib["Anonymous"] + status["RssShmem"]
        workers, open_files = _grpc_workers(pid), len(os.listdir(f"/proc/{pid}/fd"))
        return cls(own / 1024, (kib["Rss"] - own) / 1024, open_files, status["Threads"] - workers, workers)


def _grpc_workers(pid: int) -> int:
    workers = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has ended
            workers += (thread / "comm").read_text() == "event_engine\n"
    return workers


def soak(rounds: int, mib: float, console: Console) -> bool:
    """Run the simulation. Returns whether nothing grew after its first rounds."""
    console.print(f"{rounds} rounds of {mib:g} MiB")  # before the first sample, since printing takes memory
    taken: dict[str, list[Sample]] = defaultdict(list)

    def sample(event: Event) -> None:
        if event.kind != "round_finished" or event.round < WARM or event.round % 10 or event.round == rounds:
            return  # after the last round, sites write results and end
        taken["server"].append(Sample.of(os.getpid()))
        for index, pid in enumerate(_children(), 1):
            taken[f"site-{index}"].append(Sample.of(pid))
        if event.round % 100 == 0:
            console.print(f"round {event.round}: server {taken['server'][-1].own_mib:.0f} MiB")

    with tempfile.TemporaryDirectory() as folder:
        environment = Simulation(sites=2, args=(str(mib),), folder=folder, quiet=True, listeners=[sample])
        Job(app=str(HERE / "bare_site.py"), rounds=rounds).run(environment)
    heads = ("process", "after round", "memory, MiB", "files, MiB", "open files", "threads", "gRPC workers")
    table = Table(*heads, title=f"{mib:g} MiB")
    flat = True
    for name, samples in taken.items():
        tenth = max(len(samples) // 10, 1)
        first = _overall(max, samples[:tenth])
        last = _overall(statistics.median_high, samples[-tenth:])  # one alone may hold a message that is on its way
        for when, one in ((WARM, first), ((rounds - 1) // 10 * 10, last)):
            counts = map(str, (one.open_files, one.threads, one.grpc_workers))
            table.add_row(name, str(when), f"{one.own_mib:.1f}", f"{one.files_mib:.1f}", *counts)
        flat &= last.own_mib <= ALLOWED * first.own_mib
        flat &= last.open_files <= first.open_files and last.threads <= first.threads
        flat &= last.grpc_workers <= first.grpc_workers + MORE_WORKERS
    console.print(table)
    return flat


def _overall(of: Callable[[list[float]], float], samples: list[Sample]) -> Sample:
    return Sample(*(of([getattr(sample, field) for sample in samples]) for field in Sample.__dataclass_fields__))


def _children() -> list[int]:
    """Process ids of the sites."""
    files = Path("/proc/self/task").glob("*/children")
    pids = sorted(int(pid) for file in files for pid in file.read_text().split())
    return [pid for pid in pids if b"bare_site.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def by_sites(counts: list[int], mib: float, servers: int, plain: bool, console: Console) -> bool:
    """Run the servers. Returns whether the server's memory stays within its budget for every number of sites."""
    line = "gRPC" if plain else "gRPC with mutual TLS"
    heads = ("sites", "server, MiB", "lowest, MiB", "highest, MiB", "files, MiB", "threads")
    table = Table(*heads, title=f"{mib:g} MiB, over {line}")
    own = []
    for count in counts:
        taken = []
        for number in range(1, servers + 1):
            taken.append(most_of_server(count, mib, plain))
            console.print(f"{count} sites, server {number} of {servers}: {taken[-1].own_mib:.1f} MiB")
        median = _overall(statistics.median, taken)
        own.append(median.own_mib)
        limits = (f"{of(one.own_mib for one in taken):.1f}" for of in (min, max))
        table.add_row(str(count), f"{median.own_mib:.1f}", *limits, f"{median.files_mib:.1f}", f"{median.threads:.0f}")
    console.print(table)
    return max(own) <= MEMORY_MIB


def most_of_server(count: int, mib: float, plain: bool) -> Sample:
    """Run a server's process for three rounds. Returns its largest sample."""
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(count, mib, plain))
    process.start()
    assert process.pid is not None
    samples = []
    while process.is_alive():
        with suppress(OSError, KeyError):  # the process is ending
            samples.append(Sample.of(process.pid))
        process.join(EVERY_S)
    if process.exitcode != 0:
        sys.exit("the server failed")
    return max(samples, key=lambda one: one.own_mib)


def _serve(count: int, mib: float, plain: bool) -> None:
    """Serve a run in this process. Its sites are threads of another process."""
    names = [f"site-{n}" for n in range(1, count + 1)]
    only_tls_1_3()  # as `fl-adapters server` does
    use_one_arena()
    with tempfile.TemporaryDirectory() as folder:
        (_plain_server if plain else _tls_server)(Path(folder), names, mib)


def _plain_server(folder: Path, names: list[str], mib: float) -> None:
    settings = RunSettings(name="memory", sites=tuple(names), min_sites=len(names), rounds=ROUNDS)
    server = Server(settings, folder, {name: name for name in names})
    with _sites(server.start(), names, mib, None):
        ended = server.wait(PATIENCE_S)
    server.close()
    assert ended and not server.result().error, server.result().error


def _tls_server(folder: Path, names: list[str], mib: float) -> None:
    make_kits(folder, names)
    kit = read_kit(folder / "server", kind="server")
    server = FederationServer(kit, folder / "runs", read_job, listen="127.0.0.1:0")
    address = server.start()
    job = Job(app="memory.py", name="memory", rounds=ROUNDS)
    server.submit(job_fields(job), kit.identity)
    with _sites(address, names, mib, folder):
        ended = server.wait_for_job(job.name, PATIENCE_S)
    server.close()
    assert ended and not server.outcome(job.name)["error"], "the run did not end"


@contextmanager
def _sites(address: str, names: list[str], mib: float, kits: Path | None) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_run_sites, args=(address, names, mib, kits))
    process.start()
    try:
        yield
        process.join()
    finally:
        process.kill()


def _run_sites(address: str, names: list[str], mib: float, kits: Path | None) -> None:
    weights = {"w": np.zeros(int(mib * 2**18), np.float32)}
    threads = [threading.Thread(target=_site, args=(address, name, weights, kits)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _site(address: str, name: str, weights: Mapping[str, Any], kits: Path | None) -> None:
    """Run a site that sends constant weights in every round."""
    credentials = None if kits is None else FileCredentials(kits / name)
    client = SiteClient(GrpcTransport(address, name if kits is None else "", credentials), 60.0)
    attempt = client.join().attempt
    client.register(
        Manifest.of(dict(weights)), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False
    )
    while (task := client.next_task()).kind in ("initial", "train"):
        update = Update(
            job=task.job,
            round=task.round,
            stage=task.stage,
            site=name,
            attempt=attempt,
            base_version=task.version,
            arrays=dict(weights),
            num_examples=1,
        )
        client.submit(update)
    client.leave("done", early=False)
    client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("soak")
    one.add_argument("--rounds", type=int, default=2000)
    one.add_argument("--mib", type=float, default=4.0)
    other = commands.add_parser("sites")
    other.add_argument("--sites", type=int, nargs="+", default=[2, 8, 64])
    other.add_argument("--mib", type=float, default=64.0)
    other.add_argument("--servers", type=int, default=5)
    other.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    console = Console()
    if args.command == "soak":
        flat = soak(args.rounds, args.mib, console)
    else:
        flat = by_sites(args.sites, args.mib, args.servers, args.plain, console)
    if not flat:
        sys.exit("the memory grows, or exceeds its budget; see the table")


if __name__ == "__main__":
    main()
