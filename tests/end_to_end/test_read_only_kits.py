"""A federation whose kits nobody can write: server, site daemon, `run`, a script of its own, and an admin."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from read_only import bind_by_modes, bound_by_modes, contents, make_read_only
from study import until
from typer.testing import CliRunner

import fl_adapters
from fl_adapters.cli.app import app
from fl_adapters.environments.processes import free_ports
from fl_adapters.participant.kit import KIT_VARIABLE
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.files import STATE_VARIABLE
from fl_runtime.trust.working_kit import WORKING_KIT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")

_WAIT_S = 60
_PROJECT = """
federation: study
server: {address: ADDRESS, listen: ADDRESS}
sites: [{name: north, organisation: n}, {name: south, organisation: s}, {name: west, organisation: w}]
admins: [{name: ada, organisation: n, role: project-admin}, {name: mina, organisation: s, role: member}]
"""
_JOB = "{name: first, app: train, rounds: 2, strategy: fedavg}"
_SCRIPT = """
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        task.submit({"w": task.arrays["w"] + np.float32(1)}, num_examples=1)
"""


class Machine:
    """Processes that are bound by the modes of files, each with a folder for its state, and commands in this one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.kits, self._patch = folder, folder / "kits", patch
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def state(self, name: str) -> Path:
        return self.folder / f"state-{name}"

    def start(self, name: str, *words: str) -> None:
        """Start a Python process for a participant. Its kit and state are in the environment."""
        packages = str(Path(fl_adapters.__file__).parents[1])
        places = {KIT_VARIABLE: str(self.kits / name), STATE_VARIABLE: str(self.state(name))}
        self.processes[name] = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", **places},
            preexec_fn=bind_by_modes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=_WAIT_S)
        assert process.returncode == 0, said

    def ends(self, name: str) -> None:
        _, said = self.processes[name].communicate(timeout=_WAIT_S)
        assert self.processes.pop(name).returncode == 0, said

    def command(self, name: str, *words: str | Path) -> str:
        """Run a command in the name of a participant, and return what it prints."""
        self._patch.setenv(STATE_VARIABLE, str(self.state(name)))
        with bound_by_modes():
            done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_whole_job_runs_with_kits_that_nobody_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    project, job, script = tmp_path / "project.yml", tmp_path / "job.yml", tmp_path / "train.py"
    (port,) = free_ports(1)
    project.write_text(_PROJECT.replace("ADDRESS", f"127.0.0.1:{port}"))
    job.write_text(_JOB)
    script.write_text(_SCRIPT)
    machine.command("ada", "provision", project, "--out", machine.kits)
    kits = {name: machine.kits / name for name in ("server", "north", "south", "west", "ada")}
    apps = json.dumps({"apps": {"train": f"{sys.executable} {script}"}})
    (kits["north"] / "policy.yml").write_text(apps)
    for kit in kits.values():
        make_read_only(kit)
    before = {name: contents(kit) for name, kit in kits.items()}
    try:
        machine.start("server", "-m", "fl_adapters.cli", "server")
        until(lambda: answers(port), "the server")
        machine.command("ada", "job", "submit", job, "--kit", kits["ada"])
        machine.start("north", "-m", "fl_adapters.cli", "site", "--state", str(machine.state("north")))
        machine.start("south", str(script))
        machine.start("west", "-m", "fl_adapters.cli", "run", "--", sys.executable, str(script))
        machine.ends("south")
        machine.ends("west")
        result = machine.state("north") / "jobs" / "first" / "model" / "model.safetensors"
        until(result.exists, "north's results")
        machine.command(
            "ada", "cert", "revoke", "mina", "--authority", machine.kits / "authority", "--kit", kits["ada"]
        )
        machine.stop("north")
        machine.stop("server")
    finally:
        for process in machine.processes.values():
            process.kill()
            print(process.communicate()[1])
    for name, kit in kits.items():
        assert contents(kit) == before[name], name
        if name != "ada":
            assert "nothing is wrong" in machine.command(name, "audit", "verify", kit, "--kit", kit)
    newest = (machine.kits / "authority" / "crl.pem").read_bytes()
    assert (machine.state("server") / WORKING_KIT / "crl.pem").read_bytes() == newest
    np.testing.assert_array_equal(read_tensors(result)["w"], np.full(3, 2, np.float32))
