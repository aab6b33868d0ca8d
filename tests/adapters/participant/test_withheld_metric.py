"""The metric of the best round, withheld by filters: said at the end if it is proposed, refused if the job names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_adapters import Job
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import ConfigError
from fl_runtime.types import Terms

W = {"w": np.zeros(3, np.float32)}
F1 = Terms(best_metric="f1", best_mode="max")
ONLY_LOSS = ({"name": "AllowMetrics", "names": ["*loss"]},)


def scored(place: Place, terms: Terms, metrics: dict[str, float]) -> None:
    """Take part as an adapter does whose framework proposes a metric, and score every model."""
    session = open_session(Options(kit=place.kit), framework="test")
    assert session is not None
    session.register(W, agreement={}, rounds=None, evaluates=True, terms=terms)
    task = session.start(lambda: W)
    while True:
        session.report(metrics, 1)
        if task.kind == "final":
            break
        task = session.exchange({"w": task.arrays["w"] + 1}, LocalResult(1, 1, {"train_loss": 1.0}))
    session.finish()


def run(terms: Terms, metrics: dict[str, float], **job: Any) -> tuple[Any, list[BaseException | None]]:
    with LocalFederation(sites=2, rounds=3, **job) as federation:
        work = {place.name: lambda place: scored(place, terms, metrics) for place in federation.places}
        outcomes = federation.outcomes(work, check=False)
        return federation.server.result(), [outcome.error for outcome in outcomes.values()]


def test_a_proposed_metric_that_filters_withhold_leaves_the_run_without_a_best_round() -> None:
    result, errors = run(F1, {"f1": 0.5, "loss": 1.0}, filters=ONLY_LOSS)
    assert errors == [None, None] and result.error is None and len(result.rounds) == 3
    assert result.best_round is None
    assert result.no_best == (
        "no site reported 'f1' (withheld by AllowMetrics at site-1, site-2); reported: loss, train_loss"
    )


def test_a_proposed_metric_that_is_misspelt_ends_the_run_at_its_first_scores() -> None:
    result, errors = run(F1, {"F1": 0.5, "loss": 1.0})
    assert all(isinstance(error, ConfigError) for error in (*errors, result.error))
    assert "reported: F1, loss" in result.error.what and "did you mean 'F1'?" in result.error.fix


def test_a_metric_that_filters_let_through_picks_the_best_round() -> None:
    result, _ = run(F1, {"f1": 0.5, "loss": 1.0}, filters=({"name": "AllowMetrics", "names": ["f*"]},))
    assert (result.best_round, result.no_best) == (1, "")


def test_a_metric_that_the_job_names_and_filters_withhold_ends_the_run_and_says_who_withholds_it() -> None:
    result, _ = run(Terms(), {"f1": 0.5, "loss": 1.0}, filters=ONLY_LOSS, best_metric="f1")
    assert isinstance(result.error, ConfigError) and len(result.rounds) == 1
    assert "no site reports a metric of this name (withheld by AllowMetrics at site-1, site-2)" in result.error.what


def test_a_job_whose_own_filter_withholds_its_best_metric_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="AllowMetrics withholds 'f1', by which the job picks the best round"):
        Job(app="train.py", best_metric="f1", filters=ONLY_LOSS)
    Job(app="train.py", best_metric="eval_loss", filters=ONLY_LOSS)
    Job(app="train.py", filters=ONLY_LOSS)
