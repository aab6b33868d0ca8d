"""A server and a site that are killed in the second training of a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import trained_twice
from federation_bench import WAIT_S
from server_process import ServerProcess, server_process
from study import until

import fl_runtime
from fl_adapters.participant.kit import Kit

ROUNDS = 30


class Sites:
    """Two sites in processes of their own."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.processes = {name: self.start(name) for name in ("site-1", "site-2")}

    def start(self, name: str) -> subprocess.Popen[bytes]:
        folder = self._server.folder
        kit = Kit("test", name, int(name[-1]) - 1, 2, self._server.address, f"secret of {name}", str(folder), True)
        paths = [str(Path(fl_runtime.__file__).parents[1]), str(Path(trained_twice.__file__).parent)]
        environment = os.environ | {
            "FL_ADAPTERS_KIT": str(kit.save(folder / "kits" / name)),
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        with open(folder / f"{name}.log", "ab") as log:
            command = [sys.executable, trained_twice.__file__]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(WAIT_S)
        self.processes[name] = self.start(name)


def models(folder: Path, *, kills: bool) -> list[bytes]:
    """Run both trainings, and return the files of their final models."""
    with server_process(folder, 2, rounds=ROUNDS, exact_restart=True) as server:
        sites = Sites(server)
        try:
            if kills:
                until(lambda: in_second_training(folder, 2), "round 2 of the second training")
                server.kill()
                server.start()
                until(lambda: in_second_training(folder, 8), "round 8 of the second training")
                sites.kill("site-2")
                until(lambda: in_second_training(folder, 12), "round 12 of the second training")
                sites.kill("site-1")
                server.kill()
                server.start()
            assert [process.wait(WAIT_S) for process in sites.processes.values()] == [0, 0]
        finally:
            for process in sites.processes.values():
                process.kill()
        server.finished()
    return [(folder / f"model{number}" / "model.safetensors").read_bytes() for number in ("", "-2")]


def in_second_training(folder: Path, round: int) -> bool:
    file = folder / "2" / "events.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return any(event["kind"] == "round_started" and event["round"] >= round for event in events)


def test_a_server_and_sites_killed_in_the_second_training(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "disturbed").mkdir()
    expected = models(tmp_path / "undisturbed", kills=False)
    assert models(tmp_path / "disturbed", kills=True) == expected
    assert expected[0] != expected[1]
