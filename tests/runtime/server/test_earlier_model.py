"""Jobs that begin with an earlier job's result, which does not leave the server otherwise: `initial: {job: NAME}`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import errors_at_once
from study import Study

import fl_adapters as fl
from fl_adapters.environments.local import with_initial_file
from fl_runtime.errors import ConfigError, FederationError, StateMismatchError
from fl_runtime.store.backup import back_up, restore
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.types import Arrays

W = {"w": np.zeros(3, np.float32)}
SITES = ("north", "south")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, SITES) as running:
        running.job("first", every=1)
        finished = take_part(running, "first")
        assert finished["north"]["w"].tolist() == [2, 2, 2]  # two rounds that add 1
        yield running


def take_part(study: Study, job: str, own: Arrays = W) -> dict[str, Arrays]:
    """Take part with all sites: each adds 1 to every weight."""

    def add(task: Any) -> Arrays:
        return {name: array + np.float32(1) for name, array in task.arrays.items()}

    with ThreadPoolExecutor(len(SITES)) as pool:
        futures = {name: pool.submit(study.site(name).take_part, own, add, job=job) for name in SITES}
        finals = {name: future.result(60) for name, future in futures.items()}
    assert study.server.wait_for_job(job, 30)
    return finals


def test_a_job_begins_with_the_result_of_an_earlier_one(study: Study) -> None:
    name = study.job("second", by="lars", initial={"job": "first"})
    finals = take_part(study, name, {"w": np.full(3, 100, np.float32)})  # the sites' own weights do not count
    assert finals["south"]["w"].tolist() == [4, 4, 4]
    assert not list((study.runs / "second").glob("initial*")), "only results stay"


def test_it_begins_so_also_after_a_restart_of_the_server_when_the_earlier_job_is_deleted(study: Study) -> None:
    name = study.job("second", initial={"job": "first", "model": "last"})
    study.admin("ada").ask("DeleteJob", job="first")
    address = study.address
    study.server.close()
    study.start(address)
    assert take_part(study, name)["north"]["w"].tolist() == [4, 4, 4]


def test_it_begins_so_also_from_a_restored_backup(study: Study, tmp_path: Path) -> None:
    study.job("busy")
    name = study.job("second", initial={"job": "first"})  # waits for its sites
    back_up(study.runs, tmp_path / "backup", "study")
    study.admin("ada").ask("AbortJob", job="busy")
    address = study.address
    study.server.close()
    study.runs = tmp_path / "restored"
    restore(tmp_path / "backup", study.runs, "study")
    study.start(address)
    study.admin("ada").ask("AbortJob", job="busy")
    assert take_part(study, name)["north"]["w"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("initial", "text"),
    [
        ({"job": "unknown"}, "there is no job 'unknown' here to begin from"),
        ({"job": "first", "model": "best"}, "the job first has left no best model"),  # no site scored a round
        ({"job": "../first"}, "initial cannot be"),
        ({"job": "first", "model": "newest"}, "initial cannot be"),
        ({"model": "best"}, "initial cannot be"),
        ({"job": "first", "sha256": "0"}, "initial cannot be"),
    ],
)
def test_a_job_without_such_a_result_is_refused_when_it_is_submitted(
    study: Study, initial: dict[str, str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        study.job("second", initial=initial)
    assert [record.name for record in study.server.queue.records()] == ["first"]


def test_a_job_that_runs_or_was_deleted_is_refused(study: Study) -> None:
    study.job("runs")
    with pytest.raises(ConfigError, match="the job runs is running and has no result yet"):
        study.job("second", initial={"job": "runs"})
    study.admin("ada").ask("DeleteJob", job="first")
    with pytest.raises(ConfigError, match="there is no job 'first' here to begin from"):
        study.job("second", initial={"job": "first"})


@pytest.mark.parametrize(
    "own",
    [{"w": np.zeros(4, np.float32)}, {"w.lora_A": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.float64)}],
    ids=["another shape", "an adapter", "another dtype"],
)
def test_a_model_with_another_layout_is_refused_before_the_first_step(study: Study, own: Arrays) -> None:
    study.job("second", initial={"job": "first"})
    steps = []

    def step(task: Any) -> Arrays:
        steps.append(task)
        return own

    errors = errors_at_once(SITES, lambda site: study.site(site).take_part(own, step, job="second"))
    assert [type(error) for error in errors] == [StateMismatchError] * 2
    assert "the last model of the job first" in str(errors[0])
    assert not steps


def test_a_result_that_was_changed_since_is_refused(study: Study) -> None:
    study.job("busy")
    study.job("second", initial={"job": "first"})  # waits for its sites
    copy = study.runs / "second" / "initial.safetensors"
    copy.unlink()
    write_tensors(copy, {"w": np.ones(3, np.float32)})
    take_part(study, "busy")
    errors = errors_at_once(SITES, lambda site: study.site(site).take_part(W, lambda task: W, job="second"))
    assert all(isinstance(error, FederationError) and "has changed since" in str(error) for error in errors)


def test_in_python_and_in_a_simulation(tmp_path: Path) -> None:
    job = fl.Job(app="train.py", rounds=1, initial={"job": "first", "model": "best"})
    (tmp_path / "job.yml").write_text(job.to_yaml())
    assert fl.Job.from_file(tmp_path / "job.yml") == job
    with pytest.raises(ConfigError, match="the job first to begin from is not there"):
        with_initial_file(job, tmp_path)
    (tmp_path / "first" / "best").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has left no best model"):
        with_initial_file(job, tmp_path)
    write_tensors(tmp_path / "first" / "best" / "model.safetensors", W)
    found = with_initial_file(job, tmp_path).initial
    assert isinstance(found, str)
    assert read_tensors(Path(found))["w"].tolist() == [0, 0, 0]
    shutil.rmtree(tmp_path / "first")
