"""`exact_restart` with XGBoost: sites that die end with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
from killed_sites import WarmProcess, run_sites

from fl_adapters.testing import Death, LocalFederation, Place, RestartCase, Trained, failing, restart_cases
from fl_adapters.xgboost import FederatedCallback, train
from fl_runtime.errors import HandshakeError, SiteFailedError

PARAMS = d.BASE | {"objective": "binary:logistic", "subsample": 0.6, "colsample_bynode": 0.5}


class Trees:
    """A training job with a falling learning rate, sampled rows and columns, and an objective that draws too."""

    steps_per_epoch, personal, states = 1, "", ()

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        calls = 0

        def logistic(margins: Any, data: xgboost.DMatrix) -> Any:
            nonlocal calls
            calls += 1
            if fail_at and calls > fail_at:
                failing()
            gradient, hessian = d.logistic()(margins, data)
            return gradient + np.random.normal(scale=0.01, size=len(gradient)), hessian

        falling = xgboost.callback.LearningRateScheduler(lambda round: 0.5 * 0.8**round)
        booster = train(
            PARAMS | {"base_score": 0.5},
            d.matrix(site),
            epochs,
            obj=logistic,
            callbacks=[falling],
            every=2,
            **arguments,
        )
        return Trained({"model": np.frombuffer(booster.save_raw("ubj"), np.uint8)}, booster.num_boosted_rounds())

    def plain(self, site: int, *, total_steps: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_bagging(case: RestartCase) -> None:
    case(Trees())


@pytest.mark.parametrize("strategy", ["tree-bagging", "tree-cyclic"])
def test_the_scores_of_all_rounds_are_those_of_an_undisturbed_run(strategy: str, tmp_path: Path) -> None:
    """Sites wait for each other: one that comes back sends the missing score, and stops where the others do."""

    def run(deaths: list[Death], folder: str) -> tuple[Any, Any]:
        left = len(deaths)

        def site(place: Place) -> Any:
            nonlocal left
            while True:
                log: Any = {}
                data = d.matrix(place.index)
                try:
                    booster = train(
                        PARAMS,
                        data,
                        40,
                        evals=[(d.matrix(2), "test")],
                        verbose_eval=False,
                        early_stopping_rounds=4,
                        evals_result=log,
                        mode=strategy.removeprefix("tree-"),
                        kit=place.kit,
                    )
                    return booster.save_raw("ubj"), log, booster.best_iteration
                except SiteFailedError:
                    assert left
                    left -= 1

        with LocalFederation(sites=2, deaths=deaths, folder=tmp_path / folder, exact_restart=True) as federation:
            return federation.run(site), federation.result().best_round

    wanted = run([], "undisturbed")
    for death in (
        Death("site-2", "Submit", 3, heard=True),
        Death("site-1", "Score", 2),
        Death("site-2", "Score", 3, heard=True),
        Death("site-1", "Next", 4, heard=True),
    ):
        assert run([death], f"{death.method} {death.number}") == wanted


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import xgboost_data as d
from fl_adapters import site
from fl_adapters.xgboost import train
from xgboost.callback import LearningRateScheduler
params = d.BASE | {{"objective": "binary:logistic", "subsample": 0.6}}
falling = LearningRateScheduler(lambda iteration: 0.5 * 0.97**iteration)
train(params, d.matrix(site().index), 100, mode={mode!r}, every=3, callbacks=[falling])
"""


@pytest.mark.parametrize("mode", ["bagging", "cyclic"])
def test_killed_at_random_instants(mode: str, tmp_path: Path) -> None:
    """SIGKILL, with sampled rows and a learning rate that is set after each round."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(d.__file__).parent), mode=mode))
    with WarmProcess("pandas", "xgboost") as warm:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=warm, rounds=8)
        assert run_sites(tmp_path / "disturbed", script, warm=warm, kills=4, seed=5, rounds=8) == wanted


def plain(place: Place) -> None:
    xgboost.train(d.BASE, d.matrix(place.index), 9, callbacks=[FederatedCallback(kit=place.kit)])


def dart(place: Place) -> None:
    train(d.BASE | {"booster": "dart"}, d.matrix(place.index), 9, kit=place.kit)


def histogram(place: Place) -> None:
    train(d.BASE, d.matrix(place.index), 9, mode="histogram", kit=place.kit)


@pytest.mark.parametrize("work", [plain, dart, histogram])
def test_what_cannot_be_exact_is_refused_before_round_1(work: Any) -> None:
    with LocalFederation(sites=1, rounds=2, exact_restart=True) as federation:
        error = federation.outcomes({"site-1": work}, check=False)["site-1"].error
    assert isinstance(error, HandshakeError) and "exact_restart needs the capability exact-restart" in str(error)
