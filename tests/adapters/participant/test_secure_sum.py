"""Jobs with `secure_sum`: models as without it, and nothing of a single site at the server."""

from __future__ import annotations

import base64
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.testing import Death, LocalFederation, Place
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.secure_sum import SumRules
from fl_runtime.secure_sum.vectors import COUNTS
from fl_runtime.types import Arrays

EXAMPLES = (30, 10, 70, 5, 45, 20)
ROUNDS = 3


def initial() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        "w": draw.normal(size=(40, 30)).astype(np.float32),
        "half": draw.normal(size=7).astype(np.float16),
        "wide": draw.normal(size=5),
        "n": np.array(3),
    }


def trained(arrays: Arrays, index: int, round: int) -> dict[str, Any]:
    noise = np.random.default_rng([index, round])
    return {
        name: (array + 0.1 * noise.normal(size=array.shape)).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.asarray(array + 1)
        for name, array in arrays.items()
    }


def loop(place: Place, scores: bool = False, before: Callable[[int], None] = lambda round: None) -> Arrays:
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=initial()):
            before(task.round)
            if scores:
                task.report({"loss": float(place.index + task.round)}, num_examples=place.index + 1)
            task.submit(
                trained(task.arrays, place.index, task.round),
                num_examples=EXAMPLES[place.index],
                local_steps=place.index + 1,
                metrics={"train_loss": float(place.index), f"own_{place.index}": 1.0},
            )
        return site.arrays


def run(sites: int = 4, **settings: Any) -> tuple[Arrays, LocalFederation]:
    with LocalFederation(sites=sites, rounds=ROUNDS, **settings) as federation:
        finals = federation.run(loop)
        federation.result()
        model = federation.model()
        federation.kept = federation.events  # type: ignore[attr-defined]
    for final in finals.values():
        assert all(final[name].tobytes() == model[name].tobytes() for name in model)
    return model, federation


def data_of(federation: Any, kind: str) -> list[Any]:
    return [event for event in federation.kept if event.kind == kind]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sockets": True},
        {"strategy": "fedavg:weights=equal", "site_weights": {"site-2": 2.5}},
        {"strategy": "fedadam:lr=0.1"},
        {"fraction": 0.75, "min_sites": 2, "seed": 3},
    ],
)
def test_the_model_is_that_of_plain_updates(settings: dict[str, Any]) -> None:
    found, _ = run(secure_sum=True, **settings)
    wanted, _ = run(**settings)
    for name in ("w", "half", "wide", "n"):
        assert found[name].dtype == wanted[name].dtype
        rtol, atol = (2e-3, 2e-4) if name == "half" else (2e-6, 1e-6)
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol)
    again, _ = run(secure_sum=True, **settings)
    assert all(found[name].tobytes() == again[name].tobytes() for name in found)  # sums are exact, whatever the masks


def test_numbers_and_metrics_are_known_together_alone() -> None:
    _, federation = run(secure_sum=True)
    for event in data_of(federation, "update"):
        assert not event.data["metrics"] and not {"num_examples", "local_steps"} & event.data.keys()
    for event in data_of(federation, "round_finished"):
        weights = np.array(EXAMPLES[:4])
        assert event.data["num_examples"] == weights.sum() and event.data["local_steps"] == 1 + 2 + 3 + 4
        assert event.data["metrics"] == {"train_loss": pytest.approx(np.average(range(4), weights=weights))}
    text = " ".join(event.data["text"] for event in data_of(federation, "warning"))
    assert text.count("own_0") == 1, "what cannot be summed is said once"


def test_scores_of_global_models_arrive_with_the_updates_trained_from_them() -> None:
    with LocalFederation(sites=3, rounds=ROUNDS, secure_sum=True) as federation:
        federation.run(lambda place: loop(place, scores=True))
        result = federation.result()
        scored = {event.round: event.data["metrics"] for event in federation.events if event.kind == "scored"}
        assert not [event for event in federation.events if event.kind == "report" and event.site]
    for version in range(1, ROUNDS):
        expected = np.average([index + version + 1 for index in range(3)], weights=[1, 2, 3])
        assert scored[version]["loss"] == pytest.approx(expected)
    assert result.best_round == 1


def test_what_the_server_stores_is_uniform(tmp_path: Path) -> None:
    """A constant update of a million values: every byte of what is stored is as likely as any other."""
    size, read = 1_000_000, threading.Event()
    counts = np.zeros(256)

    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(size, np.float32)}):
                if place.index:
                    assert read.wait(60)
                task.submit({"w": np.full(size, 0.5, np.float32)}, num_examples=7)
                if not place.index:
                    (stored,) = (path for path in tmp_path.rglob("update-1-*") if path.stat().st_size >= 8 * size)
                    counts[:] = np.bincount(np.fromfile(stored, np.uint8, 8 * size), minlength=256)
                    read.set()

    with LocalFederation(sites=3, rounds=1, folder=tmp_path, secure_sum=True) as federation:
        federation.run(work)
        federation.result()
        assert np.allclose(federation.model()["w"], 0.5)
        journal = b"".join(path.read_bytes() for path in tmp_path.rglob("journal*"))
    expected = 8 * size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 6 * np.sqrt(2 * 255), "six standard deviations: one run in a billion fails by chance"
    assert b'"num_examples": 7' not in journal


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"strategy": "median"}, "median"),
        ({"strategy": "scaffold"}, "scaffold"),
        ({"cross_site": True}, "cross_site"),
        ({"late": "carry"}, "late"),
        ({"max_share": 0.5}, "max_share"),
        ({"optimizer_state": "average"}, "optimizer_state"),
        ({"filters": [{"name": "TopK", "fraction": 0.1}]}, "TopK"),
        ({"filters": [{"name": "Quantize", "dtype": "int8"}]}, "Quantize"),
    ],
)
def test_what_needs_single_updates_is_refused_before_the_first_step(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as found:
        fl.Job(app="train.py", rounds=2, sites=4, secure_sum=True, **settings)
    assert "secure_sum" in found.value.where


def test_a_value_beyond_the_bound_is_named_and_the_site_leaves() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
                task.submit({"w": np.array([0, 2e6, 0], np.float32)}, num_examples=1)

    with LocalFederation(sites=2, rounds=1, secure_sum=True) as federation:
        outcomes = federation.outcomes(dict.fromkeys(("site-1", "site-2"), work), check=False)
    errors = [outcome.error for outcome in outcomes.values()]
    assert any("w has the value 2e+06" in str(error) for error in errors)


@pytest.mark.parametrize(
    "death",
    [
        Death("site-2", "Submit", 1),  # before its key is there
        Death("site-2", "Submit", 2),  # before its shares
        Death("site-2", "Submit", 3),  # before its update
        Death("site-2", "Submit", 3, heard=True),  # after its update
        Death("site-2", "Submit", 4),  # before it reveals shares
        Death("site-2", "Submit", 4, heard=True),  # before it trains in the next round
    ],
)
def test_a_site_that_dies_in_any_phase_costs_its_own_update_at_most(death: Death) -> None:
    with LocalFederation(sites=4, rounds=2, min_sites=3, rejoin_s=1.5, secure_sum=True, deaths=[death]) as federation:
        outcomes = federation.outcomes({place.name: loop for place in federation.places}, check=False)
        assert len(federation.result().rounds) == 2
        model = federation.model()
        rounds = [event.data["sites"] for event in federation.events if event.kind == "round_finished"]
    assert {name for name, outcome in outcomes.items() if outcome.error} == {"site-2"}
    assert len(rounds) == 2 and "site-2" not in rounds[1]
    expected = initial()
    for number, sites in enumerate(rounds, 1):
        indices = [int(name[-1]) - 1 for name in sites]
        updates = [trained(expected, index, number) for index in indices]
        weights = [EXAMPLES[index] for index in indices]
        expected["w"] = np.average([u["w"] for u in updates], axis=0, weights=weights).astype(np.float32)
    np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-5, atol=1e-6)


def steps_of(federation: Any) -> dict[int, int]:
    """How many steps of the sum the sites were asked for in each round."""
    found: dict[int, int] = {}
    for event in data_of(federation, "task_sent"):
        found[event.round] = found.get(event.round, 0) + (event.data["task"] == "secure_sum")
    return {round: count for round, count in found.items() if round > 0}


def test_rounds_in_which_nobody_drops_out_have_one_step_beside_training() -> None:
    _, federation = run(sites=3, secure_sum=True)
    steps = steps_of(federation)
    assert steps[1] == 2 * 3 + 2  # keys, shares, and reveal, for which two of three sites are enough
    assert steps[2] == steps[3] == 2
    for event in data_of(federation, "update"):
        assert [set(item) for item in event.data["filters"]] == [{"name", "stage"}]


def test_a_site_that_dies_before_it_signs_who_the_others_are() -> None:
    deaths = [Death("site-3", "Submit", 3), Death("site-2", "Submit", 4)]  # before its update, before its signature
    with LocalFederation(sites=6, rounds=2, min_sites=4, rejoin_s=1.5, secure_sum=True, deaths=deaths) as federation:
        outcomes = federation.outcomes({place.name: loop for place in federation.places}, check=False)
        assert [len(result.sites) for result in federation.result().rounds] == [5, 4]
    assert {name for name, outcome in outcomes.items() if outcome.error} == {"site-2", "site-3"}


def test_a_site_that_comes_back_is_in_the_next_round() -> None:
    """Round 2 begins with the shares that came with the updates of round 1; round 3 asks for keys and shares again."""
    back = threading.Event()

    def returning(place: Place) -> Arrays:
        try:
            return loop(place)
        except FederationError:
            back.set()
            return loop(place)

    deaths = [Death("site-2", "Submit", 4)]
    with LocalFederation(sites=4, rounds=4, min_sites=3, rejoin_s=10, secure_sum=True, deaths=deaths) as federation:
        federation.run(lambda place: returning(place) if place.index == 1 else loop(place))
        sites = [result.sites for result in federation.result().rounds]
    assert back.is_set() and len(sites) == 4 and len(sites[-1]) == 4


def test_fewer_sites_than_a_sum_may_have_are_refused() -> None:
    with LocalFederation(sites=1, rounds=1, secure_sum=True) as federation:
        with pytest.raises(FederationError, match="min_cohort"):
            federation.run(loop)
    assert SumRules().min_cohort >= 2


class HostileKeys:
    """Stands in for a site's side of the sums and answers with keys that no sum can use."""

    def __init__(self, folder: Path, *, copied: bool) -> None:
        self._folder, self._copied = folder, copied

    @property
    def public(self) -> bytes:
        if not self._copied:
            return b"no keys"
        (journal,) = self._folder.rglob("journal.sqlite")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # until the keys of site-1 are there, as a site that has seen them could
            with closing(sqlite3.connect(journal)) as database:
                rows = database.execute("SELECT body FROM message WHERE step='keys' AND site='site-1'").fetchall()
            if rows:
                return base64.b64decode(rows[0][0].partition(" ")[2]).replace(b'"site-1"', b'"site-2"')
        raise AssertionError("site-1 has sent no keys")


@pytest.mark.parametrize("copied", [False, True])
def test_keys_that_no_sum_can_use_cost_their_sender_alone(copied: bool) -> None:
    def hostile(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            site._session._protocol._sums = HostileKeys(federation.folder, copied=copied)
            for task in site.tasks(initial=initial()):
                task.submit(trained(task.arrays, place.index, task.round), num_examples=1)
            return site.arrays

    with LocalFederation(sites=4, rounds=2, min_sites=3, rejoin_s=1.5, secure_sum=True) as federation:
        work = {place.name: hostile if place.name == "site-2" else loop for place in federation.places}
        outcomes = federation.outcomes(work, check=False)
        finished = federation.result().rounds
    assert {name for name, outcome in outcomes.items() if outcome.error} == {"site-2"}
    assert [result.sites for result in finished] == [("site-1", "site-3", "site-4")] * 2


def test_an_update_without_a_weight_costs_its_sender_alone() -> None:
    def hostile(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            protocol = site._session._protocol
            sent = protocol._sent
            protocol._sent = lambda task, arrays, *rest: sent(
                task, {name: array for name, array in arrays.items() if name != COUNTS}, *rest
            )
            for task in site.tasks(initial=initial()):
                task.submit(trained(task.arrays, place.index, task.round), num_examples=1)
            return site.arrays

    with LocalFederation(sites=4, rounds=2, min_sites=3, rejoin_s=1.5, secure_sum=True) as federation:
        work = {place.name: hostile if place.name == "site-2" else loop for place in federation.places}
        outcomes = federation.outcomes(work, check=False)
        finished = federation.result().rounds
    assert {name for name, outcome in outcomes.items() if outcome.error} == {"site-2"}
    assert "no weight" in str(outcomes["site-2"].error)
    assert [result.sites for result in finished] == [("site-1", "site-3", "site-4")] * 2
