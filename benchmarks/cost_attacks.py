"""Measures what one hostile participant costs the others, however fast it calls the server. Linux only.

A server, two honest sites and one attacker, over mutual TLS, each in a process of its own. The honest sites exchange a
model round after round, first alone, then while the attacker loops one attack in several threads without a pause. Each
attack has a federation of its own. The attacker has the lowest priority, as it would have a machine of its own.

    python benchmarks/cost_attacks.py [--attacks status streams ...] [--quiet-s 4] [--attack-s 8] [--mib 1]

Columns: seconds of the honest sites' rounds without the attack and with it (elapsed time by number of rounds), and
their ratio; the peak of the server's anonymous and shared memory in MiB, likewise; that of the honest sites' process;
disk that the server's folders take at the end, in MiB; calls of the attacker that were answered and refused.

Ends with status 1 if rounds take more than twice as long, if the server's or the sites' memory doubles, or if 1 GiB of
disk is used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from kits import make_kits
from memory import Sample
from rich.console import Console
from rich.table import Table

from fl_adapters import Job
from fl_adapters.cli.federation.server import read_job
from fl_adapters.environments.remote import job_fields
from fl_runtime.client import SiteClient
from fl_runtime.errors import FederationError
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.malloc import use_one_arena
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.transport.tls_setting import only_tls_1_3
from fl_runtime.transport.tunnel import Tunnel
from fl_runtime.trust.kits import read_kit
from fl_runtime.types import Event, Update
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

HONEST, EVIL, MEMBER = ("north", "south"), "evil", "mina"
THREADS = 8
PATIENCE_S = 60.0
SAMPLE_S = 0.1
WARM = 5
MOST_RATIO, MOST_DISK_MIB = 2.0, 1024.0
SPAWN = multiprocessing.get_context("spawn")


class Target:
    """The attacker's connections, and what an attack needs to know.

    Attributes:
        session: Session of the attacker, which has registered.
        weights: The model of the run.
        number: Number of the thread; the attacks of several threads differ by it.
    """

    def __init__(
        self, folder: Path, address: str, attempt: int, weights: dict[str, Any], number: int, counts: Any
    ) -> None:
        self.session = pb.Session(job="job", attempt=attempt)
        self.weights, self.number = weights, number
        self._ends, self._counts = folder / "ends", counts
        self._transports = {
            name: GrpcTransport(address, credentials=FileCredentials(folder / "kits" / name)) for name in (EVIL, MEMBER)
        }

    def call(
        self, method: str, messages: bytes | Iterator[bytes], *, by: str = EVIL, hold_s: float = 0.0
    ) -> list[bytes]:
        """Make a call and return its replies, or none if it was refused. With `hold_s`, cancel it after a reply."""
        call = self._transports[by].call(method, messages)
        replies = []
        try:
            for reply in call:
                replies.append(reply)
                if hold_s:
                    time.sleep(hold_s)
                    call.cancel()
        except FederationError:
            with self._counts.get_lock():
                self._counts[bool(not replies)] += 1
            return []
        with self._counts.get_lock():
            self._counts[0] += 1
        return replies

    def open_round(self) -> int:
        return self._ends.stat().st_size // 8 + 1


@cache
def many_tensors() -> dict[str, bytes]:
    """The fields of messages that describe 200,000 tensors, by call. Appended to a message, they become part of it."""
    one = pb.Manifest(tensors=[pb.Tensor(name="t", dtype="float32", shape=[1])]).SerializeToString()
    manifest = pb.Manifest.FromString(one * 200_000)
    update = pb.UpdateHeader(payload=pb.Payload(manifest=manifest))
    return {
        "Register": pb.RegisterRequest(manifest=manifest).SerializeToString(),
        "Submit": pb.UpdatePart(update=update).SerializeToString(),
    }


def register(target: Target) -> Iterator[None]:
    """Register with 200,000 tensors."""
    request = pb.RegisterRequest(session=target.session).SerializeToString() + many_tensors()["Register"]
    while True:
        target.call("Register", request)
        yield


def submit(target: Target) -> Iterator[None]:
    """Send headers of updates that describe 200,000 tensors."""
    payload = pb.Payload(layout=b"?" * 16)
    header = pb.UpdateHeader(session=target.session, round=1, content="weights", num_examples=1, payload=payload)
    request = pb.UpdatePart(update=header).SerializeToString() + many_tensors()["Submit"]
    while True:
        target.call("Submit", request)
        yield


def announce(target: Target) -> Iterator[None]:
    """Announce 128 MiB of tensors beside the weights, and send none of them."""
    for number in range(10**9):
        extra = {"moments": np.empty(2**25 - 1000 * target.number - number % 1000, np.float32)}
        manifest = Manifest.of(target.weights, extra)
        payload = frames.describe(manifest, bytes(8 * len(manifest.tensors)), known=False)
        header = pb.UpdateHeader(session=target.session, content="weights", num_examples=1, payload=payload)
        header.round = target.open_round()
        message = pb.UpdatePart(update=header).SerializeToString()
        target.call("Submit", iter([message]) if number % 2 else endless(message), hold_s=0.5)
        yield


def endless(message: bytes) -> Iterator[bytes]:
    """The message, and then a call that says nothing more."""
    yield message
    threading.Event().wait()


def join(target: Target) -> Iterator[None]:
    """Join, register with a megabyte of `info`, and leave."""
    manifest = Manifest.of(target.weights).to_proto()
    for number in range(10**9):
        info = {f"{target.number}-{number}-{n}": "x" * 4_000 for n in range(250)}
        replies = target.call("Join", pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString())
        session = pb.Session(job="job", attempt=pb.JoinReply.FromString(replies[0]).attempt if replies else 1)
        request = pb.RegisterRequest(session=session, manifest=manifest, info=info)
        target.call("Register", request.SerializeToString())
        target.call("Leave", pb.LeaveRequest(session=session, early=True).SerializeToString())
        yield


def names(target: Target) -> Iterator[None]:
    """Report metrics with new names, a thousand in every message."""
    for number in range(10**9):
        metrics = {f"m{target.number}_{number}_{n}_{'x' * 150}": 1.0 for n in range(1_000)}
        request = pb.ScoreRequest(session=target.session, version=1, num_examples=1, metrics_json=json.dumps(metrics))
        target.call("Score", request.SerializeToString())
        yield


def scores(target: Target) -> Iterator[None]:
    """Report the same metrics of one model again and again."""
    metrics = json.dumps({f"m{n}": 1.0 for n in range(100)})
    request = pb.ScoreRequest(session=target.session, version=1, num_examples=1, metrics_json=metrics)
    while True:
        target.call("Score", request.SerializeToString())
        yield


def status(target: Target) -> Iterator[None]:
    """Ask for the status as a member, who may do nothing else."""
    request = json.dumps({"x": "y" * 3_000}).encode()
    while True:
        target.call("Status", request, by=MEMBER)
        yield


def nonsense(target: Target) -> Iterator[None]:
    """Make calls that are refused, some with large messages."""
    while True:
        target.call("SubmitJob", b"{}", by=MEMBER)
        for method in ("Submit", "Register", "Score", "Next"):
            target.call(method, b"\xff" * 4_000_000)
            target.call(method, b"\xff")
        yield


def streams(target: Target) -> Iterator[None]:
    """Open streams to another site, and send without regard to what it has read."""
    data = bytes(2**20)

    def parts() -> Iterator[bytes]:
        yield pb.TunnelPart(session=target.session).SerializeToString()
        for number in range(10**9):
            stream = f"{target.number}-{number // 1000}"
            if number % 1000 == 0:
                yield pb.TunnelPart(peer=HONEST[0], stream=stream, opened="flood").SerializeToString()
            yield pb.TunnelPart(peer=HONEST[0], stream=stream, data=data).SerializeToString()

    while True:
        target.call("Tunnel", parts())
        yield


ATTACKS = {
    attack.__name__: attack for attack in (register, submit, announce, join, names, scores, status, nonsense, streams)
}


# -- the federation ----------------------------------------------------------------------------------------------------


def serve(folder: Path, began: Any) -> None:
    """Serve a job without an end. The time of every round's end is appended to a file."""
    only_tls_1_3()  # as `fl-adapters server` does
    use_one_arena()
    ends = (folder / "ends").open("ab", buffering=0)

    def listen(event: Event) -> None:
        if event.kind == "round_finished":
            ends.write(np.float64(time.monotonic()).tobytes())

    kit = read_kit(folder / "kits/server", kind="server")
    server = FederationServer(kit, folder / "runs", read_job, listen="127.0.0.1:0", listener_of=lambda job: listen)
    address = server.start()
    job = Job(app="cost_attacks.py", name="job", rounds=10**6, min_sites=2, rejoin_s=1.0)
    server.submit(job_fields(job), kit.identity)
    began.put(address)
    server.wait_for_job("job")


def take_part(folder: Path, address: str, mib: float, attempts: Any) -> None:
    """Be the honest sites. The attacker registers with them, since the run begins with all sites."""
    weights = model(mib)

    def site(name: str) -> None:
        transport = GrpcTransport(address, credentials=FileCredentials(folder / "kits" / name))
        if name == EVIL:
            attempts.put(registered(transport, weights))
            return
        client = SiteClient(transport, PATIENCE_S)
        attempt = client.join().attempt
        session = pb.Session(job="job", attempt=attempt)
        client.register(
            Manifest.of(weights), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False
        )
        tunnel = Tunnel(transport, session, lambda stream: None, lambda: None)  # reads nothing of what arrives
        while (task := client.next_task()).kind in ("initial", "train"):
            client.submit(
                Update(
                    job=task.job,
                    round=task.round,
                    stage=task.stage,
                    site=name,
                    attempt=attempt,
                    base_version=task.version,
                    arrays=weights,
                    num_examples=1,
                )
            )
        tunnel.close()

    together([threading.Thread(target=site, args=(name,)) for name in (*HONEST, EVIL)])


def registered(transport: GrpcTransport, weights: dict[str, Any]) -> int:
    """Join and register, and go silent, so that the rounds do not wait for this site. Returns its attempt."""
    (reply,) = transport.call("Join", pb.JoinRequest(protocol_min=1, protocol_max=1).SerializeToString())
    session = pb.Session(job="job", attempt=pb.JoinReply.FromString(reply).attempt)
    request = pb.RegisterRequest(session=session, manifest=Manifest.of(weights).to_proto())
    list(transport.call("Register", request.SerializeToString()))
    return session.attempt


def attack(name: str, folder: Path, address: str, mib: float, attempt: int, ready: Any, go: Any, counts: Any) -> None:
    """Loop an attack in several threads until the process is killed. They begin when all are ready, at `go`."""
    os.nice(19)
    many_tensors()

    def loop(number: int) -> None:
        target = Target(folder, address, attempt, model(mib), number, counts)
        calls = ATTACKS[name](target)
        ready.release()
        go.wait()
        for _ in calls:
            pass

    together([threading.Thread(target=loop, args=(number,)) for number in range(THREADS)])


def together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def model(mib: float) -> dict[str, Any]:
    return {"w": np.zeros(int(mib * 2**18), np.float32)}


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """What was measured for some seconds.

    Attributes:
        round_s: Seconds of a round: elapsed time by number of rounds.
        server_mib: Peak of the server's own memory.
        sites_mib: Peak of the memory of the honest sites' process.
        disk_mib: Peak of the disk that all folders take.
    """

    round_s: float
    server_mib: float
    sites_mib: float
    disk_mib: float


def watch(folder: Path, server: int, sites: int, seconds: float) -> Window:
    """Measure for so many seconds, and on until a round has ended, so that a run that stands still shows."""
    begin, end = time.monotonic(), time.monotonic() + seconds
    samples: list[tuple[float, float, float]] = []
    while (now := time.monotonic()) < end or (not round_ends(folder, begin) and now < end + PATIENCE_S):
        samples.append((Sample.of(server).own_mib, Sample.of(sites).own_mib, disk_mib(folder)))
        time.sleep(SAMPLE_S)
    ends = round_ends(folder, begin)
    round_s = (ends[-1] - begin) / len(ends) if ends else float("inf")
    return Window(round_s, *(max(column) for column in zip(*samples, strict=True)))


def round_ends(folder: Path, since: float) -> list[float]:
    ends = np.frombuffer((folder / "ends").read_bytes(), np.float64)
    return [float(end) for end in ends if end > since]


def disk_mib(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_blocks * 512
    return total / 2**20


def measure(name: str, folder: Path, args: argparse.Namespace) -> tuple[Window, Window, list[int]]:
    """Measure one attack on a federation of its own: without it, with it, and the attacker's calls."""
    began, attempts = SPAWN.Queue(), SPAWN.Queue()
    ready, go, counts = SPAWN.Semaphore(0), SPAWN.Event(), SPAWN.Array("l", 2)
    with ExitStack() as processes:

        def start(work: Callable[..., None], *arguments: Any) -> int:
            process = SPAWN.Process(target=work, args=arguments, daemon=True)
            process.start()
            processes.callback(process.join)
            processes.callback(process.kill)
            assert process.pid is not None
            return process.pid

        server = start(serve, folder, began)
        address = began.get(timeout=PATIENCE_S)
        sites = start(take_part, folder, address, args.mib, attempts)
        attempt = attempts.get(timeout=PATIENCE_S)
        start(attack, name, folder, address, args.mib, attempt, ready, go, counts)
        for _ in range(THREADS):
            if not ready.acquire(timeout=PATIENCE_S):
                raise TimeoutError(f"the attack {name} was not ready after {PATIENCE_S:g} s")
        while len(round_ends(folder, 0.0)) < WARM:
            time.sleep(SAMPLE_S)
        quiet = watch(folder, server, sites, args.quiet_s)
        go.set()
        under_attack = watch(folder, server, sites, args.attack_s)
        return quiet, under_attack, list(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--quiet-s", type=float, default=4.0)
    parser.add_argument("--attack-s", type=float, default=8.0)
    parser.add_argument("--mib", type=float, default=1.0)
    args = parser.parse_args()
    heads = ("attack", "round, s", "attacked, s", "ratio", "server, MiB", "attacked", "sites, MiB", "attacked")
    table = Table(*heads, "disk, MiB", "answered", "refused", title=f"{args.mib:g} MiB, one attacker")
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        make_kits(Path(folder) / "kits", [*HONEST, EVIL], members=[MEMBER])
        for name in args.attacks:
            place = Path(folder) / name
            shutil.copytree(Path(folder) / "kits", place / "kits")
            quiet, attacked, (answered, refused) = measure(name, place, args)
            shutil.rmtree(place)
            ratio = attacked.round_s / quiet.round_s
            memory = (quiet.server_mib, attacked.server_mib, quiet.sites_mib, attacked.sites_mib)
            numbers = [f"{quiet.round_s:.4f}", f"{attacked.round_s:.4f}", f"{ratio:.2f}"]
            numbers += [*(f"{mib:.0f}" for mib in memory), f"{attacked.disk_mib:.0f}", str(answered), str(refused)]
            table.add_row(name, *numbers)
            print(name, *numbers, flush=True)
            held = ratio <= MOST_RATIO and memory[1] < 2 * memory[0] and memory[3] < 2 * memory[2]
            if not (held and attacked.disk_mib < MOST_DISK_MIB and answered + refused):
                broken.append(name)
    Console().print(table)
    if broken:
        sys.exit(f"beyond a bound: {', '.join(broken)}")


if __name__ == "__main__":
    main()
