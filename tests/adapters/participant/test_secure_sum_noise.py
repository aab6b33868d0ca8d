"""`GaussianDP` in jobs with `secure_sum`: a site's own noise, and noise of which each site adds a share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.secure_sum.context import noise_sharers
from fl_runtime.types import Task, Update

SITES, SIZE, CLIP, NOISE, ROUNDS = 5, 200_000, 0.5, 1.5, 2
EQUAL = "fedavg:weights=equal"
SHARED = {"name": "GaussianDP", "noise_multiplier": NOISE, "clip": CLIP, "distributed": True}


def loop(place: Place) -> None:
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial={"w": np.zeros(SIZE, np.float32)}):
            task.submit({"w": task.arrays["w"] + 1e-4}, num_examples=3)


def noise_of(rounds: int = 1, **settings: Any) -> tuple[Any, list[Any]]:
    """The mean's deviation from that without noise, and the events of the updates."""
    with LocalFederation(sites=SITES, rounds=rounds, secure_sum=True, strategy=EQUAL, **settings) as federation:
        federation.run(loop)
        federation.result()
        events = [event for event in federation.events if event.kind == "update"]
        return federation.model()["w"].astype(np.float64) - rounds * 1e-4, events


def test_noise_of_all_shares_is_at_least_that_of_one_server() -> None:
    """Shares for 4 of 5 sites, all of which are there: the sum has 5/4 of the variance that the budget asks for."""
    sharers = noise_sharers(SITES)
    assert sharers == 4
    noise, _ = noise_of(filters=[SHARED])
    required = (NOISE * CLIP) ** 2
    found = np.var(noise * SITES) / required
    assert found == pytest.approx(SITES / sharers, rel=6 * math.sqrt(2 / SIZE)) and found >= 1


def test_a_sites_own_noise_is_whole_in_a_sum() -> None:
    noise, _ = noise_of(filters=[{**SHARED, "distributed": False}])
    assert np.var(noise * SITES) == pytest.approx(SITES * (NOISE * CLIP) ** 2, rel=6 * math.sqrt(2 / SIZE))


def test_epsilon_is_that_of_the_noise_in_the_sum() -> None:
    _, events = noise_of(rounds=ROUNDS, filters=[SHARED])
    accountant = PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(NOISE / 2), ROUNDS)  # replacement: sensitivity 2 clip
    last = [event.data["filters"][0] for event in events if event.round == ROUNDS]
    spent = [item["spent"] for item in last if item["name"] == "GaussianDP"]
    assert spent == pytest.approx([accountant.get_epsilon(1e-5)] * SITES, rel=2e-3)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"secure_sum": False, "strategy": EQUAL}, "the server would see each update"),
        ({"strategy": "fedavg"}, "all sites count the same"),
        ({"strategy": EQUAL, "site_weights": {"site-1": 2.0}}, "all sites count the same"),
        ({"strategy": EQUAL, "filters": [{**SHARED, "at": "server_in"}]}, "server_in"),
    ],
    ids=["no sum", "by examples", "weighted", "at the server"],
)
def test_shares_that_would_be_too_little_are_refused_when_the_job_is_made(settings: dict[str, Any], word: str) -> None:
    fields = {"secure_sum": True, "filters": [SHARED], **settings}
    with pytest.raises(ConfigError, match=word):
        fl.Job(app="train.py", rounds=2, sites=4, **fields)


@pytest.mark.parametrize("host", [FilterHost("north"), FilterHost("north", sharing=3, from_policy=True)])
def test_a_site_adds_no_share_that_the_others_need_not_complete(host: FilterHost) -> None:
    with pytest.raises(ConfigError, match="distributed"):
        GaussianDP(noise_multiplier=1.0, distributed=True).open(host)


class Weighting:
    """Stands in for a site's connection to a server that weights the site otherwise than the job says."""

    def __init__(self, client: Any, words: dict[str, Any]) -> None:
        self._client, self._words = client, words

    def next_task(self) -> Task:
        task: Task = self._client.next_task()
        if "secure_sum" not in task.config:
            return task
        return replace(task, config={**task.config, "secure_sum": {**task.config["secure_sum"], **self._words}})

    def submit(self, update: Update) -> str:
        return str(self._client.submit(update))


@pytest.mark.parametrize("words", [{"factor": 2.0}, {"factor": 1e-3}, {"equal": False}, {"equal": "yes"}])
def test_a_site_that_adds_a_share_masks_nothing_for_a_server_that_weights_it(words: dict[str, Any]) -> None:
    def weighted(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            protocol = site._session._protocol
            protocol._client = Weighting(protocol._client, words)
            for task in site.tasks(initial={"w": np.zeros(4, np.float32)}):
                task.submit({"w": task.arrays["w"]}, num_examples=3)

    settings = {"secure_sum": True, "strategy": EQUAL, "filters": [SHARED], "rejoin_s": 1.0}
    with LocalFederation(sites=3, rounds=1, **settings) as federation:
        outcomes = federation.outcomes({place.name: weighted for place in federation.places}, check=False)
        assert not [event for event in federation.events if event.kind == "update"]
    assert any("whose noise is divided equally" in str(outcome.error) for outcome in outcomes.values())


def test_facts_that_a_filter_hides_leave_masked_too() -> None:
    noise, events = noise_of(filters=[{"name": "AllowMetrics", "names": ["loss"]}])
    assert np.abs(noise).max() < 1e-6
    assert [item["name"] for event in events for item in event.data["filters"]] == ["SecureSum"] * SITES
