"""The operator's trackers at the server of a federation, over real mutual TLS and in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from study import project
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked_runs import SCRIPT, history_of

from fl_adapters.environments.processes import free_ports
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit

SITES = ("north", "south")


@pytest.fixture
def kits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    Path("train.py").write_text(SCRIPT)
    authority = Authority.create(tmp_path / "kits" / "authority", project(f"127.0.0.1:{free_ports(1)[0]}", SITES))
    for identity in authority.project.participants():
        write_kit(tmp_path / "kits" / identity.name, authority, identity)
    return tmp_path / "kits"


def started(*command: str, folder: str = ".") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fl_adapters.cli", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def scalars(folder: str) -> dict[tuple[str, int], float]:
    read = EventAccumulator(folder).Reload()
    return {(tag, item.step): item.value for tag in read.Tags()["scalars"] for item in read.Scalars(tag)}


def test_a_server_tracks_its_jobs_and_a_tracker_that_fails_costs_no_round(kits: Path) -> None:
    targets = {"north": "track: mlflow:sqlite:///own.db\n", "south": ""}
    for name, rule in targets.items():
        with (kits / name / "policy.yml").open("a") as policy:
            policy.write(rule)
    Path("job.yml").write_text("name: tumour\napp: train\nrounds: 3\ntrack: tensorboard:of-the-job\n")
    Path("full").write_text("")  # where a folder cannot be made
    options = ("--track", "tensorboard:of-the-operator", "--track", "tensorboard:full/curves")
    server = started("server", "--kit", "kits/server", "--data", "data", "--job", "job.yml", *options)
    for name in SITES:
        Path(name).mkdir()
    sites = [
        started("run", "--kit", f"../kits/{name}", "--", sys.executable, "../train.py", folder=name) for name in SITES
    ]
    for process in (*sites, server):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    wanted = {key: float(np.float32(value)) for key, value in history_of(Path("data/tumour")).items()}
    assert {step for name, step in wanted if name == "site/south/loss"} == {1, 2, 3}
    assert scalars("of-the-job/tumour") == scalars("of-the-operator/tumour") == wanted
    # a site whose policy has the rule has its own metrics alone, the other one has nothing
    own = {key: value for key, value in wanted.items() if key[0].startswith("site/north/")}
    assert {step for _, step in own} == {1, 2, 3} and {name for name, _ in own} == {"site/north/loss"}
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('north/own.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("fl-adapters").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tumour", "FINISHED")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    kept = {(name, item.step): float(np.float32(item.value)) for name, items in histories.items() for item in items}
    assert kept == own
    assert list(Path("south").iterdir()) == []
    (warning,) = [line for line in said.splitlines() if "does not take the run's records" in line]
    assert "warning server tumour: tracking: tensorboard does not take" in warning
    assert "Traceback" not in said


def test_a_target_that_cannot_work_ends_the_server_before_it_serves(kits: Path) -> None:
    for target, fix in (("neptune", "write mlflow:URI"), ("mlflow:http://:5000", "write mlflow:http://HOST:PORT")):
        server = started("server", "--kit", "kits/server", "--data", "data", "--track", target)
        _, said = server.communicate(timeout=60)
        assert server.returncode == 1 and fix in said and target.removeprefix("mlflow:") in said, said
