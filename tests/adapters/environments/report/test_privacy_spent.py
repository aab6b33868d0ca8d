"""Privacy in the report: each epsilon is that of dp-accounting, and what nobody tells is said to be unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_adapters.environments.report import write_report
from fl_adapters.environments.report.privacy import SERVER, PrivacyCost, PrivacyCosts, privacy_parts
from fl_adapters.environments.report.record import read_run
from fl_adapters.loop import connect
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.server.records.history import History

dp_accounting = pytest.importorskip("dp_accounting")

ROUNDS, NOISE, DELTA, SAMPLING = 3, 2.0, 1e-6, 0.5


def independent(event: object, times: int) -> float:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(event, times).get_epsilon(DELTA))


def train(place: Place) -> None:
    with connect(kit=place.kit) as site:
        for task in site.tasks(initial={"w": np.zeros(4, np.float32)}):
            task.submit({"w": task.arrays["w"] + 1}, num_examples=10)


@pytest.mark.parametrize("at", ["site_out", "server_in"])
def test_the_report_shows_the_epsilon_of_dp_accounting(at: str, tmp_path: Path) -> None:
    noise = {"name": "GaussianDP", "noise_multiplier": NOISE, "delta": DELTA, "adjacency": "zero", "at": at}
    event = dp_accounting.GaussianDpEvent(NOISE)
    if at == "server_in":
        noise["sampling"] = SAMPLING
        event = dp_accounting.PoissonSampledDpEvent(SAMPLING, event)
    with LocalFederation(sites=2, rounds=ROUNDS, filters=(noise,), folder=tmp_path / "federation") as federation:
        federation.run(train)
        federation.result()
        events = federation.events
    history = History(tmp_path / "run")
    for found in events:
        history(found)
    history.close()
    costs = read_run(tmp_path / "run").filters.privacy.found
    assert sorted(cost.owner for cost in costs) == ([SERVER] if at == "server_in" else ["site-1", "site-2"])
    for cost in costs:
        assert cost.delta == DELTA and cost.unit == "update"
        for number in range(1, ROUNDS + 1):
            assert cost.epsilon[number] == pytest.approx(independent(event, number), rel=0.01)
    text = write_report(tmp_path / "run").read_text("utf-8")
    assert "Privacy spent" in text and "dp-accounting" in text and f"{DELTA:g}" in text
    assert f"{max(costs[0].epsilon.values()):.4g}" in text


def only(costs: PrivacyCosts) -> PrivacyCost:
    (cost,) = costs.found
    return cost


def test_what_a_site_does_not_tell_is_not_known() -> None:
    silent = PrivacyCosts()
    silent.registered("a", {"dp_sgd_delta": "1e-05"})
    silent.update(1, "a", {}, [])  # its metrics stay at the site
    assert (only(silent).epsilon, only(silent).delta, only(silent).note) == ({}, 1e-5, "the site does not tell it")

    no_delta = PrivacyCosts()
    no_delta.update(1, "a", {"dp_sgd_epsilon": 2.0}, [])
    assert (only(no_delta).epsilon, only(no_delta).delta) == ({1: 2.0}, None)

    pooled = PrivacyCosts()
    pooled.round_finished(1, {"metrics": {"dp_sgd_epsilon": 2.0}})
    assert only(pooled).owner == "mean over sites" and "some have spent more" in only(pooled).note

    noisy = PrivacyCosts()
    noisy.update(1, "a", {"dp_sgd_epsilon": 0.7}, [{"name": "LaplaceMetrics"}])
    noisy.round_finished(1, {"metrics": {"dp_sgd_epsilon": 0.7}})
    assert all(cost.epsilon == {} for cost in noisy.found)
    assert [(cost.mechanism, cost.owner) for cost in noisy.found] == [("LaplaceMetrics", "a"), ("DP-SGD", "a")]

    hostile = PrivacyCosts()
    for value in ("nan", "x", -1, None, [1]):
        hostile.update(1, "a", {"dp_sgd_epsilon": value}, [{"name": "GaussianDP", "spent": value, "delta": value}])
    assert all((cost.epsilon, cost.delta) == ({}, None) for cost in hostile.found)


def test_noise_that_the_job_asks_of_sites_has_a_row_where_an_update_does_not_tell_it() -> None:
    asked = {"name": "GaussianDP", "delta": DELTA}
    silent = PrivacyCosts()
    silent.started([asked, {"name": "TopK"}])
    silent.update(1, "a", {}, [])
    silent.update(1, "b", {}, [{"name": "TopK"}, {**asked, "spent": 1.5}])
    silent.update(1, "c", {}, [{**asked, "spent": 2.5, "site": True}])  # by its own policy, not as the job asks
    rows = [(c.mechanism, c.owner, c.epsilon, c.delta, c.note) for c in silent.found]
    assert rows == [
        ("GaussianDP", "a", {}, DELTA, "the site does not tell it"),
        ("GaussianDP", "b", {1: 1.5}, DELTA, ""),
        ("GaussianDP", "c", {}, DELTA, "the site does not tell it"),
        ("GaussianDP (policy)", "c", {1: 2.5}, DELTA, "all jobs of the site count"),
    ]
    silent.update(2, "a", {}, [{**asked, "spent": 2.0}])
    assert (silent.found[0].epsilon, silent.found[0].note) == ({2: 2.0}, "")


def test_curves_that_the_chart_has_no_room_for_are_counted() -> None:
    costs = PrivacyCosts()
    for site in range(26):
        for number in (1, 2):
            costs.update(number, f"site-{site}", {}, [{"name": "GaussianDP", "spent": number, "delta": DELTA}])
    texts = ["".join(part.itertext()) for part in privacy_parts(costs.found, [])]
    assert texts[-1] == "The chart has the first 24 of 26 curves."
    assert not any("curves" in "".join(part.itertext()) for part in privacy_parts(costs.found[:24], []))
