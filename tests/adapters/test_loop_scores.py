"""Scores in a loop of one's own: every global model, the final one included, and when patience ends the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays

LOSSES = [9.0, 5.0, 4.0, 4.5, 4.2, 3.0, 2.0, 1.0]
"""The loss of the global model of each round; the one of round r is made of the weight r."""


def loss_of(arrays: Arrays) -> dict[str, float]:
    return {"loss": LOSSES[round(float(arrays["w"][0]))]}


def start() -> dict[str, Any]:
    return {"w": np.zeros(2)}


def trained(place: Place) -> Arrays:
    """Report the loss of each round's result as a metric of the training."""
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=start()):
            after = {"w": task.arrays["w"] + 1}
            task.submit(after, num_examples=1, metrics=loss_of(after))
        return site.arrays


def reported(place: Place, *, final: bool = True) -> Arrays:
    """Report the score of each model as it arrives and, after the loop, of the final one."""
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=start()):
            task.report(loss_of(task.arrays), 1)
            task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
        if final:
            site.report(loss_of(site.arrays), 1)
        return site.arrays


def evaluated(place: Place, **options: Any) -> Arrays:
    """Let the loop score each model."""
    with fl.connect(kit=place.kit, **options) as site:
        for task in site.tasks(initial=start(), evaluate=lambda arrays: (loss_of(arrays), 1)):
            task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
        return site.arrays


LOOPS: dict[str, Callable[[Place], Arrays]] = {"trained": trained, "reported": reported, "evaluated": evaluated}


def patient_rounds(patience: int, min_delta: float = 0.0) -> int:
    """Return after which round the losses have not improved for `patience` rounds: the definition, by hand."""
    best, since = float("inf"), 0
    for number, loss in enumerate(LOSSES[1:], 1):
        best, since = (loss, 0) if loss < best - min_delta else (best, since + 1)
        if since == patience:
            return number
    return len(LOSSES) - 1


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 1.5)])
def test_patience_ends_the_run_whenever_the_scores_come(kind: str, patience: int, min_delta: float) -> None:
    rounds = len(LOSSES) - 1
    with LocalFederation(sites=2, rounds=rounds, patience=patience, min_delta=min_delta) as federation:
        finals = federation.run(LOOPS[kind])
        result = federation.result()
    ends = patient_rounds(patience, min_delta)
    assert [done.round for done in result.rounds] == list(range(1, ends + 1))
    assert all(final["w"].tolist() == [ends] * 2 for final in finals.values())
    assert result.best_round == min(range(1, ends + 1), key=LOSSES.__getitem__)


@pytest.mark.parametrize("kind", ["reported", "evaluated"])
def test_the_final_model_can_be_scored_and_be_the_best(kind: str) -> None:
    with LocalFederation(sites=2, rounds=7) as federation:
        federation.run(LOOPS[kind])
        result = federation.result()
        assert federation.model("best")["w"].tolist() == [7.0] * 2
    assert result.best_round == 7
    assert [done.metrics["loss"] for done in result.rounds] == LOSSES[1:]


def test_a_loop_that_scores_the_final_model_alone_is_heard() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
            site.report({"loss": 0.5 + place.index}, 3 - 2 * place.index)

    with LocalFederation(sites=2, rounds=3) as federation:
        federation.run(work)
        result = federation.result()
    assert (result.best_round, result.rounds[-1].metrics["loss"]) == (3, (0.5 * 3 + 1.5) / 4)


def test_the_last_task_reports_the_model_that_is_there_after_the_loop() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
            task.report(loss_of(site.arrays), 1)

    with LocalFederation(sites=1, rounds=3) as federation:
        federation.run(work)
        assert federation.result().rounds[-1].metrics == {"loss": LOSSES[3]}


def test_without_a_final_score_the_run_ends_with_those_that_are_there() -> None:
    with LocalFederation(sites=2, rounds=7) as federation:
        federation.run(lambda place: reported(place, final=False))
        assert federation.result().best_round == 6


def test_a_score_after_the_end_is_an_error_that_says_where_it_belongs() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit(task.arrays, num_examples=1)
        site.report({"loss": 1.0}, 1)

    with LocalFederation(sites=1, rounds=1) as federation:
        error = federation.outcomes({"site-1": work}, check=False)["site-1"].error
        federation.result()
    assert isinstance(error, ConfigError)
    assert "comes too late" in error.what and "within the block" in error.fix


def test_an_error_after_the_last_round_does_not_end_the_run_of_the_others() -> None:
    def fails(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit(task.arrays, num_examples=1)
            raise ValueError("a plot failed")

    with LocalFederation(sites=2, rounds=2) as federation:
        outcomes = federation.outcomes({"site-1": fails, "site-2": trained}, check=False)
        assert len(federation.result().rounds) == 2
    assert isinstance(outcomes["site-1"].error, ValueError) and outcomes["site-2"].error is None


def test_evaluate_global_false_leaves_the_models_unscored() -> None:
    with LocalFederation(sites=1, rounds=2) as federation:
        federation.run(lambda place: evaluated(place, evaluate_global=False))
        result = federation.result()
    assert (result.best_round, result.no_best) == (None, "no site reported 'loss'")


def test_an_evaluation_that_returns_no_pair_is_refused_in_words() -> None:
    def work(place: Place) -> None:
        evaluate: Any = loss_of
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start(), evaluate=evaluate):
                task.submit(task.arrays, num_examples=1)

    with LocalFederation(sites=1, rounds=1) as federation:
        error = federation.outcomes({"site-1": work}, check=False)["site-1"].error
    assert isinstance(error, ConfigError)
    assert "has returned a dict" in error.what and "return a pair" in error.fix


def test_another_training_within_the_block_ends_the_run_of_the_first() -> None:
    def work(place: Place) -> tuple[int, Any]:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
            with fl.connect(kit=place.kit) as second:
                rounds = 0
                for task in second.tasks(initial=start()):
                    rounds += 1
                    task.submit({"w": task.arrays["w"] + 5}, num_examples=1)
            return rounds, second.arrays

    with LocalFederation(sites=2, rounds=3) as federation:
        for rounds, arrays in federation.run(work).values():
            assert rounds == 3 and arrays["w"].tolist() == [15.0] * 2


def test_a_site_can_let_the_run_end_before_its_block() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
            site.finish()
            with pytest.raises(ConfigError, match="comes too late"):
                site.report({"loss": 1.0}, 1)

    with LocalFederation(sites=1, rounds=1) as federation:
        federation.run(work)
        federation.result()
