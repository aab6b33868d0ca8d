"""The walk of docs/production.md, and every command of docs/operations.md, in one federation of processes.

The machines are folders: `scp` copies into them, and fl.example.org is a port of the loopback.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from documented import Command, Page, in_general
from read_only import bound_by_modes, make_read_only, make_writable
from typer.testing import CliRunner

import fl_adapters
from fl_adapters.cli.app import app
from fl_adapters.environments.processes import free_ports
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.files import STATE_VARIABLE
from fl_runtime.trust.kits import read_kit
from fl_runtime.trust.working_kit import WORKING_KIT

WALK, OPERATIONS = Page("production.md"), Page("operations.md")
FROM_NOTHING = "From nothing to three sites"
SITES = ("north", "south", "west")
ASKS = "approve: ask\n"

pytestmark = pytest.mark.slow

_PROGRAMS = {
    "fl-adapters": f'exec {shlex.quote(sys.executable)} -m fl_adapters.cli "$@"',
    "python": f'exec {shlex.quote(sys.executable)} "$@"',
    "scp": 'exec cp -r "$2" "$MACHINES/${3%%.*}/"',
}


class Machines:
    """The machine of the server and authority, and one for each site, each with its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "fl"
        self.printed: list[str] = []
        self.ran: set[str] = set()
        self.before_first_job: list[Command] = []
        self.logs: dict[str, Path] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("bin", "fl", *SITES):
            (folder / name).mkdir()
        for name, text in _PROGRAMS.items():
            program = folder / "bin" / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)
        packages = str(Path(fl_adapters.__file__).parents[1])
        paths = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": packages}
        here = {"MACHINES": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._environment = {**os.environ, **paths, **here}
        self._environment.pop("FL_ADAPTERS_KIT", None)
        self._ports = dict(zip(("8443", "9464", "9465"), map(str, free_ports(3)), strict=True))

    def here(self, text: str) -> str:
        """The text of a page with the addresses of this test."""
        text = text.replace("fl.example.org", "127.0.0.1")
        return re.sub(r"\b(8443|9464|9465)\b", lambda found: self._ports[found[0]], text)

    def metrics(self, page: str, port: str = "9464") -> str:
        """Fetch a page that the server, or a daemon at the documented port, has for monitoring."""
        try:
            with urlopen(f"http://127.0.0.1:{self._ports[port]}/{page}", timeout=30) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            return str(error.read().decode())

    # -- the walk -------------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """Run the walk from the first command to the downloaded model."""
        files = {name: self.here(text) for name, text in WALK.files(FROM_NOTHING).items()}
        for name in ("project.yml", "tumour.yml"):
            (self.home / name).write_text(files[name])
        for command in WALK.commands(FROM_NOTHING):
            if "job submit" in command.line:
                self.before_first_job = [item for item in WALK.commands(FROM_NOTHING) if item.line in self.ran]
            self.ran.add(command.line)
            if command.line.startswith(("fl-adapters server", "fl-adapters site")):
                self.start(command.line, command.machine)
                continue
            self._shell(command.line)
            if command.line.startswith("scp"):
                site = command.line.split("/")[1].split()[0]
                (self.folder / site / "train.py").write_text(files["train.py"])
                self.policy(site)
        for site in SITES:
            log = self.logs[site]
            until(partial(said, log, "tumour-1: finished"), f"the end of tumour-1 at {site}")
        for log in self.logs.values():
            self.printed += log.read_text().splitlines()

    def policy(self, site: str, more: str = "") -> None:
        """Write the policy of the walk, and further rules."""
        (self.folder / site / site / "policy.yml").write_text(WALK.files(FROM_NOTHING)["north/policy.yml"] + more)

    def _shell(self, line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.home, env=self._environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        self.printed += [*done.stdout.splitlines(), *done.stderr.splitlines()]

    # -- processes ------------------------------------------------------------------------------------------------

    def start(self, line: str, machine: str = "") -> None:
        """Start the server, or a site's daemon, and wait until it is at work."""
        name = machine or "server"
        self.logs[name] = log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            begun = out.tell()
            self._processes[name] = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.folder / machine if machine else self.home,
                env=self._environment,
                stdout=out,
                stderr=out,
            )
        sign = b"waits for jobs" if machine else b"serving at"
        until(lambda: sign in log.read_bytes()[begun:], f"{sign.decode()} in {log.read_text()}")

    def stop(self, name: str) -> None:
        """Stop a process as a service manager does."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(60)

    # -- commands in this process ---------------------------------------------------------------------------------

    def cli(self, line: str, status: int = 0) -> str:
        """Run a command of fl-adapters at the machine that its kit belongs to, and return what it prints."""
        words = shlex.split(self.here(line))[1:]
        if "provision" not in words:
            words = [re.sub(r"^kits/(north|south|west)$", rf"{self.folder}/\1/\1", word) for word in words]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == status, f"{line}: {done.output}"
        return str(done.output)

    def section(self, heading: str) -> Iterator[str]:
        """Yield the commands under a heading of docs/operations.md, in order, to be run by `cli` or `start`."""
        for command in OPERATIONS.commands(heading):
            self.ran.add(command.line)
            yield command.line

    def submit(self, name: str, *options: str, **fields: Any) -> None:
        """Submit a short job for north and south."""
        lines = {"name": name, "app": "tumour", "rounds": 2, "sites": ["north", "south"], **fields}
        (self.home / f"{name}.yml").write_text(json.dumps(lines))
        self.cli(shlex.join(["fl-adapters", "job", "submit", f"{name}.yml", "--kit", "kits/lena", *options]))

    def state(self, job: str) -> str:
        answer = json.loads(self.cli(f"fl-adapters job show {job} --kit kits/ada --json").splitlines()[-1])
        return str(answer["state"])

    def asked(self, site: str, job: str) -> None:
        """Wait until a job waits for approval."""
        record = self.folder / site / site / "jobs" / job / "site.json"
        until(lambda: record.exists() and "waits for approval" in record.read_text(), f"{job} to wait at {site}")


def said(log: Path, text: str) -> bool:
    """Whether a process has written a text to its log."""
    return text in log.read_text()


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("machines"))
    try:
        machines.walk()
        yield machines
    finally:
        machines.close()


@pytest.fixture
def machines(walked: Machines, monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.chdir(walked.home)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    return walked


def one_round(w: Any, index: int) -> Any:
    """The training of the walk's script at one site."""
    x = np.random.default_rng(index).normal(size=(200, 3))
    y = x @ [1.0, -2.0, 0.5]
    for _ in range(5):
        w = w - 0.1 * x.T @ (x @ w - y) / len(x)
    return w


def trained(rounds: int, sites: int) -> Any:
    """The model of the walk's script as a plain loop."""
    w = np.zeros(3)
    for _ in range(rounds):
        w = np.mean([one_round(w, index) for index in range(sites)], axis=0)
    return w


def test_eight_commands_lead_to_a_federation_and_one_to_a_model(machines: Machines) -> None:
    assert len(machines.before_first_job) == 8
    model = read_tensors(machines.home / "results" / "model" / "model.safetensors")
    np.testing.assert_allclose(model["w"], trained(5, 3), rtol=1e-12)
    for site in SITES:
        at_site = read_tensors(machines.folder / site / site / "jobs" / "tumour-1" / "model" / "model.safetensors")
        assert at_site["w"].tolist() == model["w"].tolist()


def test_the_walk_shows_what_screens_show(machines: Machines) -> None:
    printed = {in_general(line) for line in machines.printed}
    for line in WALK.screens(FROM_NOTHING):
        assert in_general(line) in printed, f"{line!r} as {in_general(line)!r} is not in {sorted(printed)}"


def test_a_further_job_and_what_to_watch(machines: Machines) -> None:
    machines.submit("tumour-2", "--follow", sites=list(SITES), rounds=1)
    out = {line: machines.cli(line) for line in machines.section("What to watch")}
    told = "\n".join(out.values())
    for text in ("3 sites", "no problem", "finished, 5 rounds", "left: reason all rounds are done", "rounds"):
        assert text in told


def test_a_backup_makes_the_server_whole_again(machines: Machines) -> None:
    backup, restore = machines.section("Backup and restore")
    machines.cli(backup)
    machines.stop("server")
    data = machines.home / "kits" / "server-data"
    data.rename(machines.home / "lost")
    machines.cli(restore)
    file = Path("tumour-1", "model", "model.safetensors")
    assert (data / file).read_bytes() == (machines.home / "lost" / file).read_bytes()
    server, daemon = machines.section("With Prometheus")
    machines.start(machines.here(server))
    assert machines.metrics("healthz").strip() == "ok"
    machines.stop("north")
    machines.start(machines.here(daemon).replace("kits/north", "north"), "north")
    until(lambda: machines.metrics("healthz", "9465").strip() == "ok", "the daemon to be well")
    assert 'fl_adapters_site_present{site="north"}' in machines.metrics("metrics")
    machines.submit("tumour-8", "--follow", rounds=1)
    assert machines.state("tumour-1") == machines.state("tumour-8") == "finished"


def test_the_queue_and_its_priorities(machines: Machines) -> None:
    machines.policy("south", ASKS)
    for name, file in [("tumour-6", "job.yml"), ("tumour-7", "urgent.yml")]:
        fields = {"name": name, "app": "tumour", "rounds": 2, "sites": ["north", "south"]}
        (machines.home / file).write_text(json.dumps(fields))
    machines.submit("tumour-3")
    machines.asked("south", "tumour-3")
    for line in machines.section("Queue and priorities"):
        machines.cli(line)
        if "abort" in line:
            assert machines.state("tumour-3") == "aborted"
            until(lambda: machines.state("tumour-7") == "running", "the urgent job to run")
            assert machines.state("tumour-6") == "queued"
        if "resume" in line:
            assert machines.state("tumour-3") == "queued"
    machines.cli("fl-adapters job show tumour-1 --kit kits/ada", status=1)
    for name in ("tumour-6", "tumour-3", "tumour-7"):
        machines.cli(f"fl-adapters job abort {name} --kit kits/ada")
    machines.policy("south")


def test_room_and_approval(machines: Machines) -> None:
    fields = {"name": "tumour-9", "app": "tumour", "sites": ["north", "south"]}
    (machines.home / "job.yml").write_text(json.dumps(fields))
    for line in machines.section("Room at a site: slots, GPUs, memory"):
        assert "nothing refuses this job" in machines.cli(line)
    machines.policy("south", ASKS)
    approve, refuse = machines.section("Approval")
    machines.submit("tumour-4", rounds=1)
    machines.asked("south", "tumour-4")
    machines.cli(approve)
    until(lambda: machines.state("tumour-4") == "finished", "the approved job to finish")
    machines.submit("tumour-5")
    machines.asked("south", "tumour-5")
    machines.cli(refuse)
    until(lambda: machines.state("tumour-5") == "failed", "the refused job to end")
    assert "no ethics vote yet" in machines.cli("fl-adapters job logs tumour-5 --kit kits/ada")
    machines.policy("south")


def test_members_come_and_go(machines: Machines) -> None:
    plan = machines.home / "project.yml"
    plan.write_text(plan.read_text().replace("admins:", "  - {name: east, organisation: east-hospital}\nadmins:"))
    for line in machines.section("Membership"):
        machines.cli(line)
        if "provision" in line:
            assert "4 sites" in machines.cli("fl-adapters status --kit kits/ada")
            assert (machines.home / "kits" / "east" / "kit.json").exists()
    assert "west" not in machines.cli("fl-adapters status --kit kits/ada")
    until(lambda: "its certificate was revoked" in machines.logs["west"].read_text(), "west to be told")


def test_a_kit_that_cannot_be_written(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    kit, state = machines.home / "kits" / "north", machines.home / "state-north"
    monkeypatch.setenv(STATE_VARIABLE, str(state))
    make_read_only(kit)
    with bound_by_modes():
        assert read_kit(kit).folder == (state / WORKING_KIT).resolve()
        AuditLog(state / WORKING_KIT, state / WORKING_KIT).write("started")
        (line,) = machines.section("Kits that cannot be written")
        assert "1 lines, nothing is wrong" in machines.cli(line)
    make_writable(kit)
    shutil.rmtree(state)


def test_every_command_of_the_page_was_run(machines: Machines, request: pytest.FixtureRequest) -> None:
    selected = {item.name for item in request.session.items if item.path == request.path}
    if not {name for name in globals() if name.startswith("test_")} <= selected:
        pytest.skip("some tests of this file were not selected")
    commands = {command.line for heading in OPERATIONS.headings() for command in OPERATIONS.commands(heading)}
    assert commands - machines.ran == set()
