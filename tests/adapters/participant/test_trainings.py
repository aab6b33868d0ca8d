"""A script that trains more than once: every training is a run of its own."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from study import Study, readdressed

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import ConfigError, HandshakeError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays

ROUNDS = 3


def train(place: Place, start: float, step: float, rounds: int = ROUNDS) -> Arrays:
    """One training: every site adds its own step in each round."""
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial={"w": np.full(4, start, np.float32)}, rounds=rounds):
            task.submit({"w": task.arrays["w"] + np.float32(step * (site.index + 1))}, num_examples=1)
    return site.arrays


def expected(start: float, step: float, rounds: int = ROUNDS) -> np.ndarray:
    """The mean over two sites that add `step` and twice `step`."""
    return np.full(4, start + rounds * step * 1.5, np.float32)


def three(place: Place) -> list[Arrays]:
    return [train(place, 0.0, 1.0), train(place, 10.0, 2.0, rounds=2), train(place, -5.0, 4.0)]


def test_each_training_is_a_run_of_its_own(tmp_path: Path) -> None:
    with LocalFederation(sites=2, folder=tmp_path) as federation:
        trained = federation.run(three)
        federation.result()
        results = [federation.server.result(number) for number in (1, 2, 3)]
        models = [federation.server.export(tmp_path / f"out-{number}", training=number) for number in (1, 2, 3)]
    wanted = [expected(0, 1), expected(10, 2, 2), expected(-5, 4)]
    for arrays in trained.values():
        for got, want in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(got["w"], want)
    assert [len(result.rounds) for result in results] == [3, 2, 3]
    for path, want in zip(models, wanted, strict=True):
        assert path is not None
        np.testing.assert_array_equal(read_tensors(path)["w"], want)
    assert (tmp_path / "2" / "server" / "journal.sqlite").exists() and (tmp_path / "3" / "server").exists()


def test_a_script_with_fewer_trainings_is_named(tmp_path: Path) -> None:
    def once(place: Place) -> Arrays:
        return train(place, 0.0, 1.0)

    def twice(place: Place) -> Arrays:
        once(place)
        return train(place, 0.0, 1.0)

    with LocalFederation(sites=2) as federation:
        outcomes = federation.outcomes({"site-1": twice, "site-2": once}, check=False)
    assert outcomes["site-2"].error is None
    error = outcomes["site-1"].error
    assert isinstance(error, HandshakeError)
    assert "a different number of times: site-2: its script ended after 1 training" in str(error)


def test_a_job_of_one_training_names_the_second() -> None:
    with LocalFederation(sites=2, trainings=1) as federation:
        outcomes = federation.outcomes(dict.fromkeys(("site-1", "site-2"), three), check=False)
        result = federation.result()
    assert len(result.rounds) == ROUNDS and result.error is None
    for outcome in outcomes.values():
        assert isinstance(outcome.error, ConfigError)
        assert "the job holds 1 training" in str(outcome.error) and "begins training 2" in str(outcome.error)


def test_a_job_with_an_initial_file_holds_one_training(tmp_path: Path) -> None:
    from fl_runtime.store.tensorfile import write_tensors

    write_tensors(tmp_path / "start.safetensors", {"w": np.zeros(4, np.float32)})
    with LocalFederation(sites=2, initial=str(tmp_path / "start.safetensors")) as federation:
        outcomes = federation.outcomes(dict.fromkeys(("site-1", "site-2"), three), check=False)
    assert all("only one training can begin with them" in str(outcome.error) for outcome in outcomes.values())


def test_a_site_that_stops_early_comes_to_the_next_training() -> None:
    def stops(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(4, np.float32)}):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
                break
        return train(place, 0.0, 1.0)

    def stays(place: Place) -> Arrays:
        train(place, 0.0, 1.0)
        return train(place, 0.0, 1.0)

    with LocalFederation(sites=2, min_sites=1) as federation:
        outcomes = federation.outcomes({"site-1": stays, "site-2": stops})
        results = [federation.server.result(number) for number in (1, 2)]
    for outcome in outcomes.values():
        assert outcome.value is not None
        np.testing.assert_array_equal(outcome.value["w"], expected(0, 1))
    assert [len(result.rounds[-1].sites) for result in results] == [1, 2]


def test_a_notebook_takes_part_in_one_job_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its process goes on, and nobody waits for its end. The next job is no second training of the first."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    def adds_one(kit: Path) -> Arrays:
        with fl.connect(kit=str(kit)) as site:
            for task in site.tasks(initial={"w": np.zeros(4, np.float32)}):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
        return site.arrays

    with Study(tmp_path) as study, ThreadPoolExecutor() as threads:
        kits = [readdressed(study, name) for name in study.sites]
        for job in ("first", "second"):
            study.job(job, rounds=2)
            for arrays in threads.map(adds_one, kits, timeout=60):
                np.testing.assert_array_equal(arrays["w"], np.full(4, 2, np.float32))
            assert study.server.wait_for_job(job, 60)
            outcome = study.server.outcome(job)
            assert outcome["error"] is None and [len(item["rounds"]) for item in outcome["trainings"]] == [2]
