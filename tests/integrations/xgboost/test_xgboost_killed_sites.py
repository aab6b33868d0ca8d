"""A site is killed within a round: the run ends clearly, or continues without it, or with it once it is back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
import xgboost_site_process

import fl_adapters
from fl_adapters import FederationError, QuorumError
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="loopback addresses beside 127.0.0.1 are Linux's")
MODES = [
    "bagging",
    "cyclic",
    pytest.param("histogram", marks=LINUX),
]
ROUNDS = 6
VICTIM = "site-3"
LAST_CALL = {"bagging": 3, "cyclic": 2, "histogram": 3}  # of its objective; the first is for the base score


class Bench:
    """A federation whose last site is a process; the others are threads of this one."""

    def __init__(self, mode: str, tmp_path: Path, **settings: Any) -> None:
        self.mode, self.folder = mode, tmp_path
        self.federation = LocalFederation(sites=d.SITES, sockets=True, **settings)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, dies_at: int) -> subprocess.Popen[bytes]:
        place = next(place for place in self.federation.places if place.name == VICTIM)
        path = [
            str(Path(fl_adapters.__file__).parents[1]),
            str(Path(d.__file__).parent),
            os.environ.get("PYTHONPATH", ""),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        arguments = [place.kit, self.mode, str(ROUNDS), str(dies_at), str(self.folder / "model.ubj")]
        process = subprocess.Popen([sys.executable, xgboost_site_process.__file__, *arguments], env=environment)
        self.processes.append(process)
        return process

    def others(self, collective_timeout_s: int = 15) -> dict[str, Any]:
        """Run the two sites of this process; return their results."""

        def site(place: Any) -> xgboost.Booster:
            return train(
                d.BASE | {"base_score": 0.0},
                d.matrix(place.index),
                ROUNDS,
                obj=d.logistic(),
                mode=self.mode,
                kit=place.kit,
                collective_timeout_s=collective_timeout_s,
            )

        work = {name: site for name in d.SITES if name != VICTIM}
        return self.federation.outcomes(work, timeout_s=90, check=False)


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: list[Bench] = []

    def make(mode: str, **settings: Any) -> Bench:
        made.append(Bench(mode, tmp_path, **settings))
        made[0].federation.__enter__()
        return made[0]

    yield make
    for item in made:
        for process in item.processes:
            process.kill()
            process.wait()
        item.federation.__exit__(None, None, None)


def dies(bench: Bench, dies_at: int, *, told: bool) -> threading.Thread:
    """Start the site that will die; `told` makes the server hear of it at once, as in a simulation."""
    process = bench.start(dies_at)

    def wait() -> None:
        assert process.wait() == -signal.SIGKILL
        if told:
            bench.federation.server.site_left(VICTIM, "its process was killed")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("mode", MODES)
def test_without_a_quorum_the_run_ends_with_who_is_missing(bench: Any, mode: str) -> None:
    run = bench(mode)
    dies(run, LAST_CALL[mode], told=True)
    outcomes = run.others()
    assert run.federation.server.wait(30)
    error = run.federation.server.result().error
    assert isinstance(error, QuorumError) and VICTIM in str(error)
    assert all(isinstance(outcome.error, FederationError) for outcome in outcomes.values())


@pytest.mark.parametrize("mode", MODES)
def test_with_a_quorum_the_others_finish(bench: Any, mode: str) -> None:
    run = bench(mode, min_sites=2)
    dies(run, LAST_CALL[mode], told=True)
    boosters = [outcome.value for outcome in run.others().values()]
    assert [e.error for e in [run.federation.server.result()]] == [None]
    assert boosters[0].save_raw("ubj") == boosters[1].save_raw("ubj")
    assert boosters[0].num_boosted_rounds() == ROUNDS
    assert len(run.federation.result().rounds) == ROUNDS


@LINUX
def test_a_frozen_site_is_done_without_after_the_deadline(bench: Any) -> None:
    """Its connections stay open, and the others' workers wait for it no longer than their timeout."""
    run = bench("histogram", min_sites=2, deadline_s=8.0)
    run.start(-LAST_CALL["histogram"])
    boosters = [outcome.value for outcome in run.others(collective_timeout_s=4).values()]
    assert boosters[0].save_raw("ubj") == boosters[1].save_raw("ubj")
    assert boosters[0].num_boosted_rounds() == ROUNDS
    assert VICTIM not in run.federation.result().rounds[-1].sites


@pytest.mark.parametrize("mode", MODES)
def test_a_site_that_comes_back_goes_on(bench: Any, mode: str, tmp_path: Path) -> None:
    run = bench(mode, rejoin_s=60.0)
    death = dies(run, LAST_CALL[mode], told=False)

    def again() -> None:
        death.join()
        run.start(0)

    threading.Thread(target=again, daemon=True).start()
    outcomes = run.others()
    assert not any(outcome.error for outcome in outcomes.values())
    boosters = [outcome.value for outcome in outcomes.values()]
    assert run.processes[1].wait(60) == 0
    raw = {bytes(booster.save_raw("ubj")) for booster in boosters} | {(tmp_path / "model.ubj").read_bytes()}
    assert len(raw) == 1 and boosters[0].num_boosted_rounds() == ROUNDS
    with LocalFederation(sites=d.SITES) as federation:  # undisturbed
        expected = federation.run(
            lambda place: train(
                d.BASE | {"base_score": 0.0},
                d.matrix(place.index),
                ROUNDS,
                obj=d.logistic(),
                mode=mode,
                kit=place.kit,
            ),
            timeout_s=60,
        )["site-1"]
    np.testing.assert_array_equal(d.margins(boosters[0], d.matrix(None)), d.margins(expected, d.matrix(None)))
