"""A metric that is NaN at one site is NaN for the federation: it is told, and it never wins."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once, registered, serving
from server_process import server_process

from fl_adapters.environments.progress import metrics_text
from fl_adapters.environments.remote import _event
from fl_runtime.aggregation.metrics.pooling import from_json, pooled, to_json
from fl_runtime.aggregation.metrics.ranking import Ranking
from fl_runtime.server.courses.scores import Scores
from fl_runtime.server.federation.jobs import EventBuffer
from fl_runtime.server.records.history import History
from fl_runtime.server.records.site_metrics import ShownMetrics
from fl_runtime.types import Event, Report, Summary

START = {"w": np.zeros(3, np.float32)}


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_a_part_that_is_nan_makes_the_pooled_value_nan_as_in_numpy() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        values, weights = draw.normal(size=4), draw.integers(0, 5, 4)
        values[draw.random(4) < 0.3] = np.nan
        parts = [
            ({"loss": float(v), "rmse": Summary("root_mean", abs(float(v)), int(w))}, int(w))
            for v, w in zip(values, weights, strict=True)
        ]
        counted = weights > 0
        if not counted.any():
            assert pooled(parts) == {}
            continue
        wanted = np.average(values[counted], weights=weights[counted])
        root = np.sqrt(np.average(values[counted] ** 2, weights=weights[counted]))
        np.testing.assert_allclose([pooled(parts)["loss"], pooled(parts)["rmse"]], [wanted, root], rtol=1e-12)


def test_metrics_are_valid_json_and_come_back() -> None:
    given = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": Summary("root_mean", math.nan, 2.0)}
    found = from_json(json.loads(json.dumps(to_json(given), allow_nan=False), parse_constant=refuse))
    np.testing.assert_equal([found[name] for name in "abcd"], [given[name] for name in "abcd"])
    summary = found["e"]
    assert isinstance(summary, Summary) and math.isnan(summary.value) and summary.weight == 2.0


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_never_wins(mode: Any) -> None:
    scores, ranking = Scores(ShownMetrics({})), Ranking("loss", mode)
    for number, values in enumerate([(1.0, 3.0), (math.nan, -5.0), (9.0, math.nan)], 1):
        for site, value in zip("ab", values, strict=True):
            scores.report(number, site, {"loss": value}, 10)
    assert math.isnan(scores.of(2)["loss"])
    assert not scores.better(ranking, 2, 1) and not scores.better(ranking, 3, 1)
    assert not scores.better(ranking, 3, 2)
    assert scores.better(ranking, 1, 2)


def test_a_round_that_diverged_at_one_site_is_not_the_best_after_a_kill_either(tmp_path: Path) -> None:
    losses = {"site-1": [3.0, 2.0, 0.1], "site-2": [3.0, 2.0, math.nan]}
    with server_process(tmp_path, 2, rounds=3, best_metric="loss", best_mode="min") as server:
        sites = [server.site(name) for name in losses]
        registered(sites, START, evaluates=True)
        tasks = {site.name: site.start(START) for site in sites}
        for number in range(1, 4):
            for site in sites:
                loss = losses[site.name][number - 1]
                site.submit(tasks[site.name], START, 5, metrics={"train_loss": loss})
                if site.name == "site-1":  # the update of site-1 is in the journal, and that of site-2 is not
                    server.kill()
                    server.start()
            tasks = dict(zip(losses, at_once(sites, lambda site: site.client.next_task()), strict=True))
            for site in sites:
                report = Report("test", number, site.name, {"loss": losses[site.name][number - 1]}, 5)
                site.client.report(report)
        best = at_once(sites, lambda site: site.client.next_task(best=True))
        assert [task.version for task in best] == [2, 2]
        for site in sites:
            site.client.leave("done", early=False)
            site.vanish()
        server.finished()
    with sqlite3.connect(tmp_path / "server" / "journal.sqlite") as db:
        texts = [text for (text,) in db.execute("SELECT result FROM round UNION ALL SELECT metrics FROM score") if text]
    assert any('"nan"' in text for text in texts)
    for text in texts:
        json.loads(text, parse_constant=refuse)


def test_a_site_that_waits_for_the_scores_receives_nan(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench:
        sites, tasks = bench.started(START, evaluates=True)
        for name, site in sites.items():
            site.submit(tasks[name], START)
        bench.run(lambda name: sites[name].client.next_task())
        losses = {"site-1": math.nan, "site-2": 1.0}
        found = bench.run(
            lambda name: sites[name].client.report(Report("test", 1, name, {"loss": losses[name]}, 1), wait=True)
        )
    assert all(math.isnan(metrics["loss"]) for metrics, _ in found.values())


def test_tables_say_nan_also_after_a_restart(tmp_path: Path) -> None:
    update = {"status": "used", "num_examples": 1, "local_steps": 1, "seconds": 1.0, "bytes_up": 1}
    events = [
        Event("round_started", 1.0, 1, "", {"sites": ["a"]}),
        Event("update", 1.0, 1, "a", {**update, "metrics": {"train_loss": math.nan}}),
    ]
    for _ in range(2):  # the second one reads the events of the first
        history = History(tmp_path)
        for item in events:
            history(item)
        history.close()
        events = []
    text = (tmp_path / "history.csv").read_text()
    assert text.splitlines()[1].endswith("nan")
    assert metrics_text({"loss": math.nan}) == "loss nan"


def test_a_client_that_watches_a_job_receives_nan() -> None:
    buffer = EventBuffer()
    buffer.append(Event("scored", 1.0, 1, "", {"metrics": {"loss": math.nan, "x": 1.5}, "best_round": 1}))
    _, fields = next(buffer.follow(0, 0.1))
    assert fields is not None
    event = _event(json.loads(json.dumps(fields, allow_nan=False)))
    np.testing.assert_equal(event.data, {"metrics": {"loss": math.nan, "x": 1.5}, "best_round": 1})
