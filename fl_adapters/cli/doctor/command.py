"""Command `fl-adapters doctor`: checks what is installed and what this machine allows."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_adapters.cli.doctor.checks import Check, Status
from fl_adapters.cli.doctor.script_checks import script_checks
from fl_adapters.cli.output import console_for, show_json
from fl_adapters.environments.processes import available_cores
from fl_adapters.participant.kit import KIT_VARIABLE, read_kit
from fl_runtime.errors import FederationError

_STYLES: dict[Status, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}
_NEEDED_BYTES = 2**30
_NEEDED_FILES = 1024
_TIMEOUT_S = 10.0


def run(folder: Path, port: int, kit: Path | None, as_json: bool, script: Path | None = None) -> int:
    """Run all checks and show them. Returns exit status 1 if there is a problem."""
    console = console_for(as_json)
    console.print("fl-adapters doctor: checking", style="dim")
    if script is not None:
        return _show(list(script_checks(script)), console, as_json)
    checks = [*_machine(), *_packages(), _loopback(), _disk(folder), _open_files()]
    if kit is None:
        checks.append(_kit())
    else:
        from fl_adapters.cli.doctor.kit_checks import kit_checks

        checks += kit_checks(kit)
    if port:
        checks.append(_port(port))
    return _show(checks, console, as_json)


def _show(checks: list[Check], console: Console, as_json: bool) -> int:
    counts = Counter(check.status for check in checks)
    console.print(_table(checks))
    console.print(_summary(counts), highlight=False)
    if as_json:
        numbers = {"problems": counts["problem"], "notes": counts["note"]}
        show_json({"ok": not counts["problem"], **numbers, "checks": [asdict(check) for check in checks]})
    return 1 if counts["problem"] else 0


def _summary(counts: Counter[Status]) -> str:
    """What the checks come to, and what to do about it."""

    def number(status: Status) -> str:
        return f"{counts[status]} {status}{'' if counts[status] == 1 else 's'}"

    if counts["problem"]:
        also = f", and {number('note')} to read" if counts["note"] else ""
        return f'{number("problem")} to mend first{also}: see the column "to do"'
    if counts["note"]:
        return f'no problem, and {number("note")}: nothing fails, but read the column "to do" before you rely on a run'
    return f"no problem and no note in {counts.total()} checks"


def _table(checks: list[Check]) -> Table:
    table = Table("", "check", show_lines=False)
    for heading in ("found", "to do"):
        table.add_column(heading, overflow="fold")  # fold, so that a fingerprint is shown in full
    for check in checks:
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, check.detail, check.fix)
    return table


def _machine() -> Iterator[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "problem", f"{version} {sys.executable}", "" if good else "3.11 or newer")
    yield Check("platform", "ok", f"{platform.platform()}, {available_cores()} cores")


def _packages() -> Iterator[Check]:
    """Checks of fl-adapters and of the packages in its metadata. Packages of extras may be missing."""
    try:
        yield Check("fl-adapters", "ok", metadata.version("fl-adapters"))
        requirements = metadata.requires("fl-adapters") or []
    except metadata.PackageNotFoundError:
        yield Check("fl-adapters", "note", "not installed as a package", "pip install fl-adapters")
        return
    floors: dict[str, str] = {}
    extras: dict[str, list[str]] = {}  # that need each package; "" stands for the base install
    for line in requirements:
        match = re.match(r"([\w.-]+)[^;]*?(?:>=\s*([\w.]+))?[^;]*(?:;(.*))?$", line)
        if match is None:
            continue
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", match[3] or "")
        if extra is None or extra[1] not in ("dev", "test"):
            floors.setdefault(match[1], match[2] or "")
            extras.setdefault(match[1], []).append(f"[{extra[1]}]" if extra else "")
    for name, floor in floors.items():
        yield _package(name, floor, extras[name])


def _package(name: str, floor: str, extras: list[str]) -> Check:
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        if "" not in extras:
            only = f"only {extras[0]} needs it" if len(extras) == 1 else f"needed by {', '.join(extras)}"
            return Check(name, "ok", f"not installed; {only}")
        return Check(name, "problem", "missing", f"pip install '{name}>={floor}'")
    if floor and _numbers(installed) < _numbers(floor):
        return Check(name, "problem", f"{installed} is too old", f"pip install '{name}>={floor}'")
    return Check(name, "ok", f"{installed} (at least {floor})" if floor else installed)


def _numbers(version: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros: (2, 13) for "2.13.0+cpu"."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version, maxsplit=1)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _loopback() -> Check:
    """Send a message over a real gRPC connection of this machine to itself."""
    error = _within(_TIMEOUT_S, _echo)
    if error == "":
        return Check("gRPC on the loopback", "ok", "a message made the round trip")
    fix = "allow connections to 127.0.0.1"
    return Check("gRPC on the loopback", "problem", error or f"no answer within {_TIMEOUT_S:g} s", fix)


def _echo() -> str:
    """Send a message and get it back. Returns what went wrong, or ""."""
    try:
        from fl_runtime.transport.grpc import GrpcServer, GrpcTransport, tokens_to_names
    except ImportError as error:
        return f"gRPC cannot be imported: {error}"
    server = GrpcServer(_Echo(), tokens_to_names({"doctor": "secret"}), 1, 1)
    client = GrpcTransport(server.start("127.0.0.1", 0), "secret")
    try:
        answer = list(client.call("Join", b"ping"))
        return "" if answer == [b"ping"] else "the message came back changed"
    except FederationError as error:
        return error.what
    finally:
        client.close()
        server.stop(0)


class _Echo:
    """A service that sends every message back."""

    def handle(self, method: str, peer: object, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield from requests


def _within(timeout_s: float, work: Callable[[], str]) -> str | None:
    """The result of `work`, or None if it takes longer than `timeout_s` seconds. Its thread then continues alone."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return results[0] if results else None


def _port(port: int) -> Check:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(
                f"port {port}",
                "problem",
                error.strerror or str(error),
                "choose another port, or end the program that uses it",
            )
    return Check(f"port {port}", "ok", "free")


def _disk(folder: Path) -> Check:
    parent = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        return Check("disk", "problem", f"{parent}: {error.strerror}", "choose another folder with --folder")
    free = shutil.disk_usage(parent).free
    detail = f"{parent} is writable, {free / 2**30:.1f} GiB free"
    if free < _NEEDED_BYTES:
        return Check("disk", "note", detail, "a run needs a few times the model's size per site")
    return Check("disk", "ok", detail)


def _open_files() -> Check:
    if os.name != "posix":
        return Check("open files", "ok", "this system has no such limit")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _NEEDED_FILES:
        return Check("open files", "note", f"at most {soft}", f"ulimit -n {_NEEDED_FILES} for more than a few sites")
    return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _kit() -> Check:
    folder = os.environ.get(KIT_VARIABLE)
    if not folder:
        return Check("startup kit", "ok", f"{KIT_VARIABLE} is not set: scripts run alone")
    try:
        kit = read_kit(folder)
    except FederationError as error:
        return Check("startup kit", "problem", f"{error.what} ({error.where})", error.fix)
    host, _, port = kit.server.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3.0).close()
    except (OSError, ValueError) as error:
        detail = f"{kit.site} of {kit.job}: no connection to {kit.server}: {error}"
        return Check("startup kit", "problem", detail, "start the server, or check the firewall and the kit's address")
    return Check("startup kit", "ok", f"{kit.site} of {kit.job}, server {kit.server} answers")
