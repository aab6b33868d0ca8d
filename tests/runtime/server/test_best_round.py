"""The best round: which metric names it, what happens without a score, and with a metric that nobody reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_runtime.errors import ConfigError, HandshakeError
from fl_runtime.types import Report, Terms
from fl_runtime.wire.manifest import Manifest
from tests._support.federation_bench import Bench, ended, errors_at_once, serving

W = {"w": np.zeros(1)}


def scored_run(
    bench: Bench,
    name: str,
    scores: Sequence[Mapping[str, float]],
    terms: Terms | None = None,
    training: Mapping[str, float] | None = None,
) -> int | None:
    """Take part in a run, reporting `scores[version]` of every global model; return the best version."""
    site = bench.site(name)
    site.join()
    site.client.register(
        Manifest.of(W), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=bool(scores), terms=terms
    )
    task = site.start(W)
    while True:
        if scores:
            site.client.report(Report("test", task.version, name, scores[task.version], 1))
        if task.kind == "final":
            break
        site.submit(task, {"w": task.arrays["w"] + 1}, metrics=training or {})
        task = site.client.next_task()
    best = site.client.next_task(best=True)
    site.client.leave("done", early=False)
    assert best.kind == "best"
    return best.version if best.arrays else None


LOSSES = [{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]
ACCURACIES = [{"loss": 1.0, "accuracy": value} for value in (0.1, 0.2, 0.9, 0.3)]


@pytest.mark.parametrize(
    ("job", "terms", "scores", "best"),
    [
        ({}, None, LOSSES, 1),
        ({"best_mode": "max"}, None, LOSSES, 3),
        ({}, Terms(best_metric="accuracy", best_mode="max"), ACCURACIES, 2),
        ({"best_metric": "accuracy"}, Terms(best_metric="accuracy", best_mode="max"), ACCURACIES, 2),
        ({"best_metric": "accuracy"}, Terms(best_metric="f1", best_mode="max"), ACCURACIES, 1),  # f1's mode is not its
        ({"best_metric": "accuracy", "best_mode": "max"}, Terms(best_metric="f1"), ACCURACIES, 2),
    ],
)
def test_the_job_then_the_terms_then_loss_choose_the_best_round(
    tmp_path: Path, job: dict[str, Any], terms: Terms | None, scores: list[dict[str, float]], best: int
) -> None:
    with serving(tmp_path, 2, sockets=False, rounds=3, **job) as bench:
        assert bench.run(lambda name: scored_run(bench, name, scores, terms)) == {"site-1": best, "site-2": best}
        ended(bench.server)
        result = bench.server.result()
        assert (result.best_round, result.no_best) == (best, "")


@pytest.mark.parametrize(
    ("job", "scores", "training", "why"),
    [
        ({}, [], {}, "no site reported 'loss'"),
        ({}, [], {"train_loss": 1.0}, "no site reported 'loss'; reported: train_loss"),
        ({"best_metric": "accuracy"}, [], {}, "no site reported 'accuracy'"),  # nobody evaluates
        ({}, [{}] * 3, {}, "no site reported 'loss'"),
        ({}, [{"dice": 0.5}] * 3, {}, "no site reported 'loss'; reported: dice"),  # nobody named the default
    ],
)
def test_without_a_score_no_round_is_the_best(
    tmp_path: Path,
    job: dict[str, Any],
    scores: list[dict[str, float]],
    training: dict[str, float],
    why: str,
) -> None:
    with serving(tmp_path, 2, sockets=False, rounds=2, **job) as bench:
        found = bench.run(lambda name: scored_run(bench, name, scores, training=training))
        ended(bench.server)
        result = bench.server.result()
        exported = bench.server.export(tmp_path / "best", "best")
        finished = bench.watch.all("finished")[0].data
    assert found == {"site-1": None, "site-2": None}
    assert (result.best_round, result.no_best, exported) == (None, why, None)
    assert (finished["best_round"], finished["no_best"]) == (None, why)
    assert not (tmp_path / "best").exists()


def test_a_round_without_a_score_is_not_better_than_one_with(tmp_path: Path) -> None:
    scores = [{}, {"loss": 5.0}, {"accuracy": 1.0}, {"accuracy": 1.0}]
    with serving(tmp_path, 1, sockets=False, rounds=3, best_metric="loss") as bench:
        assert scored_run(bench, "site-1", scores) == 1


@pytest.mark.parametrize("sockets", [False, True])
@pytest.mark.parametrize(
    ("job", "terms"),
    [({"best_metric": "acuracy"}, None), ({}, Terms(best_metric="acuracy", best_mode="max"))],
)
def test_a_best_metric_that_nobody_reports_ends_the_run_at_its_first_scores(
    tmp_path: Path, job: dict[str, Any], terms: Terms | None, sockets: bool
) -> None:
    with serving(tmp_path, 2, sockets=sockets, rounds=9, **job) as bench:
        errors = errors_at_once(bench.names, lambda name: scored_run(bench, name, ACCURACIES * 3, terms))
        assert bench.server.wait(30)
        result = bench.server.result()
    for error in (*errors, result.error):
        assert isinstance(error, ConfigError)
        assert "'acuracy'" in error.what and "reported: accuracy, loss" in error.what
        assert "did you mean 'accuracy'?" in error.fix
        assert error.where == "best_metric, scores of round 1"
    assert len(result.rounds) == 1
    assert [event.kind for event in bench.watch.events if event.kind in ("failed", "finished")] == ["failed"]


def test_sites_that_propose_different_metrics_are_refused(tmp_path: Path) -> None:
    terms = {"site-1": Terms(), "site-2": Terms(best_metric="accuracy", best_mode="max")}
    with serving(tmp_path, 2, sockets=False) as bench:
        errors = errors_at_once(bench.names, lambda name: scored_run(bench, name, ACCURACIES, terms[name]))
    for error in errors:
        assert isinstance(error, HandshakeError)
        assert "best_metric: loss != accuracy" in error.what and "--best-metric" in error.fix


def test_a_site_that_scores_nothing_has_no_say_in_the_best_metric(tmp_path: Path) -> None:
    given = {"site-1": ([], Terms()), "site-2": (ACCURACIES, Terms(best_metric="accuracy", best_mode="max"))}
    with serving(tmp_path, 2, sockets=False, rounds=3) as bench:
        assert bench.run(lambda name: scored_run(bench, name, *given[name])) == {"site-1": 2, "site-2": 2}


def test_with_a_single_round_the_error_comes_at_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, 2, sockets=False, rounds=1, best_metric="f1") as bench:
        errors = errors_at_once(bench.names, lambda name: scored_run(bench, name, LOSSES))
        assert bench.server.wait(30)
        assert isinstance(bench.server.result().error, ConfigError)
    assert all(isinstance(error, ConfigError) for error in errors)
    assert not bench.watch.all("finished")


def test_one_site_that_reports_the_metric_is_enough(tmp_path: Path) -> None:
    scores = {"site-1": ACCURACIES, "site-2": LOSSES}
    with serving(tmp_path, 2, sockets=False, rounds=2, best_metric="accuracy", best_mode="max") as bench:
        assert set(bench.run(lambda name: scored_run(bench, name, scores[name])).values()) == {2}


def test_a_metric_of_training_can_be_the_best_metric(tmp_path: Path) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=2, best_metric="train_loss") as bench:
        assert scored_run(bench, "site-1", LOSSES, training={"train_loss": 1.0}) == 1
