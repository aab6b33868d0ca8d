"""Differential privacy: the noise on updates, the ledger, and the epsilon that is claimed."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fl_adapters import Job
from fl_runtime.aggregation import FedAvg, make_strategy
from fl_runtime.errors import ConfigError, PrivacyBudgetError, StoreError
from fl_runtime.filters import check_filters
from fl_runtime.filters.base import Facts, FilterHost
from fl_runtime.filters.calibration import Participation, participation
from fl_runtime.filters.facts import NoisyMetrics
from fl_runtime.filters.gaussian import GaussianDP, NoisyMean
from fl_runtime.filters.ledger import BudgetLimit, Ledger, Mechanism, PrivacyBudget, epsilon
from fl_runtime.filters.server import ServerFilters, decoded
from fl_runtime.filters.site import SiteFilters
from fl_runtime.server.courses.sampling import sample_sites
from fl_runtime.types import Array, Arrays, RunSettings, ServerState, Settings, Task, Update

dp_accounting = pytest.importorskip("dp_accounting")
DELTA = 1e-5


def model() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(300, 400)).astype(np.float32),
        "h": rng.normal(size=30_000).astype(ml_dtypes.bfloat16),
        "b": rng.normal(size=50_000),
        "steps": np.array(7, np.int64),
    }


def moved(base: Arrays, length: float) -> dict[str, Array]:
    """Return `base` plus a difference of L2 norm `length`, with the counter increased."""
    rng = np.random.default_rng(1)
    real = {n: rng.normal(size=a.shape) for n, a in base.items() if n != "steps"}
    norm = math.sqrt(sum(float((d**2).sum()) for d in real.values()))
    weights = {n: (base[n].astype(np.float64) + d * (length / norm)).astype(base[n].dtype) for n, d in real.items()}
    return {**weights, "steps": np.array(99)}


def site(settings: Settings, base: Arrays, home: FilterHost = FilterHost("site-1", "job")) -> SiteFilters:  # noqa: B008
    filters = SiteFilters([settings], (), home)
    filters.agree(base)
    return filters


def sent(filters: SiteFilters, base: Arrays, arrays: Arrays, round: int = 1) -> Update:
    task = filters.received(Task("job", round, "", "train", round - 1, base))
    return filters.outgoing(Update("job", round, "", "site-1", 1, round - 1, arrays, 10), task)


# -- what leaves ---------------------------------------------------------------------------------------------


def test_the_update_is_clipped_as_a_whole_and_the_noise_has_the_stated_size() -> None:
    base = model()
    leaves = sent(site({"name": "GaussianDP", "clip": 2.0, "noise_multiplier": 0.01}, base), base, moved(base, 20.0))
    exact = moved(base, 2.0)  # the same direction, at the length of the clip
    sigma = 0.02
    for name in ("w", "b"):
        noise = leaves.arrays[name].astype(np.float64) - (exact[name].astype(np.float64) - base[name])
        count = noise.size
        assert abs(noise.mean()) < 5 * sigma / count**0.5
        assert noise.var() == pytest.approx(sigma**2, rel=5 * (2 / count) ** 0.5)
        assert abs(np.corrcoef(noise.reshape(-1)[:-1], noise.reshape(-1)[1:])[0, 1]) < 5 / count**0.5
    assert leaves.content == "delta" and leaves.arrays["h"].dtype == base["h"].dtype
    assert leaves.arrays["steps"] == 7  # what the site did does not show in a counter


def test_a_short_update_is_not_stretched_and_nothing_is_repeated() -> None:
    base = model()
    settings = {"name": "GaussianDP", "clip": 5.0, "noise_multiplier": 1e-7}
    arrays = moved(base, 1.0)
    leaves = [sent(site(settings, base), base, arrays).arrays["w"].copy() for _ in range(2)]
    np.testing.assert_allclose(leaves[0], arrays["w"] - base["w"], atol=1e-5)
    np.random.seed(1)
    a = sent(site({"name": "GaussianDP", "noise_multiplier": 1.0}, base), base, base).arrays["w"].copy()
    np.random.seed(1)
    b = sent(site({"name": "GaussianDP", "noise_multiplier": 1.0}, base), base, base).arrays["w"].copy()
    assert abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) < 5 / a.size**0.5


@pytest.mark.parametrize("name", ["GaussianDP", "SVTPrivacy"])
@pytest.mark.parametrize("kind", ["bn.running_var", "norm/moving_variance"])
def test_running_statistics_neither_leave_nor_use_up_the_clip(name: str, kind: str) -> None:
    """The weights move by 0.36 and the statistics by 2.31: with a clip of 1 the weights must not be shortened."""
    base = {"w": np.zeros(900, np.float32), kind: np.ones(32, np.float32)}
    arrays = {"w": np.full(900, 0.012, np.float32), kind: np.full(32, 1 + 2.31 / 32**0.5, np.float32)}
    arguments = {"noise_multiplier": 1e-6} if name == "GaussianDP" else {"gamma": 1.0}
    filters = site({"name": name, **arguments}, base)
    leaves = sent(filters, base, arrays)
    assert list(leaves.arrays) == ["w"] and filters.held_back == [kind]
    if name == "GaussianDP":
        np.testing.assert_allclose(leaves.arrays["w"], arrays["w"], atol=1e-5)
    back = decoded(leaves, base)
    assert list(back.arrays) == ["w"]
    for task in ("train", "final", "best"):
        arrived = {n: np.copy(a) for n, a in base.items()}
        seen = filters.received(Task("job", 2, "", task, 1, arrived))  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen.arrays[kind], arrays[kind])
        np.testing.assert_array_equal(seen.arrays["w"], base["w"])


def test_statistics_that_reach_the_server_are_not_released_with_central_noise() -> None:
    base = {"w": np.zeros(50, np.float32), "bn.running_var": np.ones(50, np.float32)}
    home = FilterHost(job="job")
    settings = {"name": "GaussianDP", "clip": 1.0, "noise_multiplier": 3.0, "at": "server_in"}
    filters = ServerFilters([settings], home)
    allocated = {n: np.empty(a.shape, a.dtype) for n, a in base.items()}
    aggregator = filters.aggregator(lambda _: pytest.fail("not used"), base, lambda a, e: (allocated, {}), linear=True)
    far = {"w": base["w"] + 0.1, "bn.running_var": base["bn.running_var"] * 100}
    aggregator.add(Update("job", 1, "", "site-1", 1, 0, far, 1))
    model, _ = aggregator.result()
    np.testing.assert_array_equal(model["bn.running_var"], base["bn.running_var"])
    assert model["w"].std() > 1


def test_statistics_under_encryption_are_refused_with_the_way_out() -> None:
    filters = SiteFilters(
        [{"name": "GaussianDP", "noise_multiplier": 1.0}, {"name": "HomomorphicCKKS"}], (), FilterHost("site-1", "job")
    )
    with pytest.raises(ConfigError, match=r"such as bn.running_var.*\n.*\n.*keep_local: .*running_var.*GroupNorm"):
        filters.agree({"w": np.zeros(3, np.float32), "bn.running_var": np.ones(3, np.float32)})


def test_central_noise_is_added_once_to_a_mean_of_equals() -> None:
    base = model()
    home = FilterHost(job="job")
    settings = {"name": "GaussianDP", "clip": 1.0, "noise_multiplier": 0.5, "at": "server_in"}
    filters = ServerFilters([settings], home)
    buffers: list[dict[str, Array]] = []

    def allocate(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        buffers.append({n: np.empty(a.shape, a.dtype) for n, a in arrays.items()})
        return buffers[-1], {}

    aggregator = filters.aggregator(
        lambda a: FedAvg().aggregator(base, a, {}, ServerState()), base, allocate, linear=True
    )
    parts = [moved(base, 0.5), moved(base, 40.0), base]
    for index, arrays in enumerate(parts):
        aggregator.add(Update("job", 1, "", f"site-{index}", 1, 0, arrays, num_examples=10**index))
    actual, _ = aggregator.result()
    exact = (moved(base, 0.5)["w"].astype(np.float64) - base["w"] + moved(base, 1.0)["w"] - base["w"]) / 3
    noise = actual["w"] - base["w"] - exact
    assert noise.var() == pytest.approx((0.5 / 3) ** 2, rel=0.03)
    assert actual["steps"] == 7


def test_sampling_is_random_and_the_denominator_is_not() -> None:
    base = {"w": np.zeros(4, np.float32)}
    settings = GaussianDP(clip=1.0, noise_multiplier=1e-9, adjacency="zero", sampling=0.25)
    releases = settings.releases(FilterHost())

    def drawn() -> float:
        mean = NoisyMean(settings, releases, base, lambda a, e: ({"w": np.empty(4, np.float32)}, {}))
        for index in range(8):
            mean.add(
                Update("job", 1, "", f"site-{index}", 1, 0, {"w": np.full(4, 0.5, np.float32)}, 1, content="delta")
            )
        return float(mean.result()[0]["w"][0])

    values = np.array([drawn() for _ in range(300)])
    counts = np.rint(values / 0.5 * 2).astype(int)  # the denominator is 0.25 * 8
    assert len(set(counts)) > 3
    assert counts.mean() == pytest.approx(2, abs=5 * (8 * 0.25 * 0.75 / 300) ** 0.5)


def test_metrics_are_limited_and_noisy() -> None:
    home = FilterHost("site-1", "job")
    actual = [
        NoisyMetrics(low=0, high=2, epsilon=4.0).facts(Facts({"a": 1.0, "b": 50.0, "c": object()}, 5), home).metrics
        for _ in range(400)
    ]
    a, b = (np.array([metrics[name] for metrics in actual]) for name in ("a", "b"))
    assert set(actual[0]) == {"a", "b"} and a.min() >= 0 and b.max() == 2.0
    assert np.median(np.abs(a - 1)) == pytest.approx(math.log(2) * 0.5, abs=0.1)  # scale 2 / 4


# -- what is claimed -----------------------------------------------------------------------------------------


def independent(*events: tuple[Any, int], delta: float = DELTA) -> float:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    for event, count in events:
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 10), (2.5, 40), (0.7, 3), (20.0, 100)])
def test_epsilon_of_rounds_is_that_of_dp_accounting(noise: float, rounds: int) -> None:
    expected = independent((dp_accounting.GaussianDpEvent(noise / 2), rounds))  # replace: twice the sensitivity
    actual = epsilon([GaussianDP(noise_multiplier=noise).release(noise)] * rounds, DELTA)
    assert actual == pytest.approx(expected, rel=0.01)


def test_epsilon_of_sampled_rounds_and_of_mixtures_is_that_of_dp_accounting() -> None:
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.5))
    sampled = GaussianDP(noise_multiplier=1.5, adjacency="zero", sampling=0.2).release(1.5)
    assert epsilon([sampled] * 30, DELTA) == pytest.approx(independent((event, 30)), rel=0.01)

    mixture = [Mechanism("gaussian", 3.0)] * 5 + [Mechanism("laplace", 2.0)] * 4
    expected = independent((dp_accounting.GaussianDpEvent(3.0), 5), (dp_accounting.LaplaceDpEvent(2.0), 4))
    assert epsilon(mixture, DELTA) == pytest.approx(expected, rel=0.01)
    assert epsilon([Mechanism("pure", 0.5)] * 2, 1e-9) == pytest.approx(1.0, rel=0.01)
    assert epsilon([], DELTA) == 0.0


def test_little_noise_has_a_large_epsilon_and_not_none() -> None:
    exact = independent((dp_accounting.GaussianDpEvent(0.2), 1))
    assert epsilon([Mechanism("gaussian", 0.2)], DELTA) == pytest.approx(exact, rel=0.01)
    assert 2e7 > epsilon([Mechanism("gaussian", 0.0002)], DELTA) > 1e7
    for other in (Mechanism("laplace", 0.1), Mechanism("pure", 500.0), Mechanism("gaussian", 0.1, 0.5)):
        alone, little = epsilon([other] * 10, DELTA), epsilon([Mechanism("gaussian", 0.001)], DELTA)
        assert 5e5 < little < epsilon([Mechanism("gaussian", 0.001)] + [other] * 10, DELTA) < little * 1.1 + alone * 1.1


def test_everything_that_was_spent_only_ever_adds() -> None:
    spent: list[Mechanism] = []
    so_far = 0.0
    for mechanism in [
        Mechanism("pure", 0.1),
        Mechanism("gaussian", 2.0, 0.3),
        Mechanism("laplace", 3.0),
        Mechanism("gaussian", 1.0),
        Mechanism("pure", 60.0),
        Mechanism("gaussian", 0.1, 0.3),
        Mechanism("gaussian", 0.01),
    ]:
        spent.append(mechanism)
        assert epsilon(spent, DELTA) >= so_far * 0.999
        so_far = epsilon(spent, DELTA)


def test_the_closed_form_of_one_gaussian_release_agrees() -> None:
    """Balle and Wang 2018, theorem 8: delta(epsilon) of the Gaussian mechanism, without a grid."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for noise in (0.5, 1.0, 3.0):
        actual = epsilon([Mechanism("gaussian", noise)], DELTA)
        s = 1 / noise
        delta = normal(s / 2 - actual / s) - math.exp(actual) * normal(-s / 2 - actual / s)
        assert delta == pytest.approx(DELTA, rel=0.01)


# -- the noise for a budget ----------------------------------------------------------------------------------


def budgeted(rounds: int, folder: Path | None = None, **settings: Any) -> tuple[Settings, FilterHost]:
    plan = Participation.every_round(rounds)
    return {"name": "GaussianDP", **settings}, FilterHost("site-1", "job", folder, participation=plan)


@pytest.mark.parametrize(
    ("target", "rounds", "delta"), [(8.0, 20, 1e-5), (1.0, 100, 1e-6), (0.3, 3, 1e-5), (50, 7, 1e-4)]
)
def test_epsilon_alone_is_enough_and_is_used_up_by_the_last_round(target: float, rounds: int, delta: float) -> None:
    base = {"w": np.zeros(5, np.float32)}
    settings, host = budgeted(rounds, epsilon=target, delta=delta)
    filters = site(settings, base, host)
    for number in range(1, rounds + 1):
        (ran,) = json.loads(sent(filters, base, base, number).encoding)
    noise = ran["noise_multiplier"]
    assert ran["spent"] <= target
    assert ran["spent"] == pytest.approx(
        independent((dp_accounting.GaussianDpEvent(noise / 2), rounds), delta=delta), rel=0.01
    )
    assert ran["spent"] == pytest.approx(target, rel=0.001)
    with pytest.raises(PrivacyBudgetError, match=f"round {rounds + 1} "):
        sent(filters, base, base, rounds + 1)


def test_a_round_that_is_repeated_costs_noise_and_not_the_run(tmp_path: Path) -> None:
    base = {"w": np.zeros(5, np.float32)}
    settings, host = budgeted(5, tmp_path, epsilon=4)
    used = []
    for number in (1, 2, 2, 3, 4, 5):  # a new process each time, as after a kill
        (ran,) = json.loads(sent(site(settings, base, host), base, base, number).encoding)
        used.append(ran["noise_multiplier"])
    assert used[0] == used[1] < used[2]
    assert used[3:] == pytest.approx(used[2:3] * 3, rel=1e-4)
    events = [(dp_accounting.GaussianDpEvent(noise / 2), 1) for noise in used]
    assert independent(*events) == pytest.approx(4, rel=0.01) and ran["spent"] <= 4


def test_noise_counts_the_rounds_for_which_a_site_is_drawn() -> None:
    names = tuple(f"site-{i}" for i in range(10))
    settings = RunSettings("job", names, 1, rounds=30, fraction=0.3, seed=5)
    plans = participation(settings)
    for number in range(1, 31):
        assert {n for n, plan in plans.items() if number in plan.rounds} == set(sample_sites(settings, number, names))
    counts = [len(plan.rounds) for plan in plans.values()]
    most = max(counts)
    assert sum(counts) == 90 and {plan.most for plan in plans.values()} == {most} and most < 20
    noise = GaussianDP(epsilon=8).multiplier(most)
    assert independent((dp_accounting.GaussianDpEvent(noise / 2), most)) == pytest.approx(8, rel=0.01)
    turns = participation(RunSettings("job", names[:3], 1, rounds=9), make_strategy("cyclic"))
    assert [list(plan.rounds) for plan in turns.values()] == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


def test_noise_with_secret_sampling_is_that_of_dp_accounting() -> None:
    noise = GaussianDP(epsilon=3, adjacency="zero", sampling=0.1).multiplier(25)
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(noise))
    assert independent((event, 25)) == pytest.approx(3, rel=0.01)


def test_central_noise_is_computed_too_and_the_budget_is_used_up() -> None:
    base = {"w": np.zeros(3, np.float32)}
    host = FilterHost(job="job", participation=Participation.every_round(2))
    filters = ServerFilters([{"name": "GaussianDP", "epsilon": 2, "at": "server_in"}], host)
    for number in (1, 2):
        filters.afford(number)
        aggregator = filters.aggregator(
            lambda _: pytest.fail("not used"), base, lambda a, e: ({"w": np.empty(3, np.float32)}, {}), linear=True
        )
        aggregator.add(Update("job", number, "", "site-1", 1, number - 1, base, 1))
        aggregator.result()
    with pytest.raises(PrivacyBudgetError, match="the privacy budget of the server is spent: round 3"):
        filters.afford(3)


def test_a_plan_that_exceeds_what_other_jobs_have_left_is_refused_before_its_first_round(tmp_path: Path) -> None:
    base = {"w": np.zeros(5, np.float32)}
    limit = BudgetLimit(PrivacyBudget(6.0, DELTA), "site-1", all_jobs=True)
    settings, host = budgeted(4, tmp_path, epsilon=5)
    first = site(settings, base, replace(host, budget=limit))
    for number in range(1, 5):
        sent(first, base, base, number)
    other = site(settings, base, replace(host, job="other", budget=limit))
    with pytest.raises(PrivacyBudgetError, match="rounds 1 to 4 would bring epsilon to .* for all jobs"):
        other.received(Task("other", 1, "", "train", 0, base))


def test_all_trainings_of_a_job_share_its_budget(tmp_path: Path) -> None:
    base = {"w": np.zeros(5, np.float32)}
    settings, host = budgeted(3, tmp_path, epsilon=4)
    host = replace(host, participation=Participation.every_round(3, trainings=2))
    for job in ("job", "job/2"):
        filters = site(settings, base, replace(host, job=job))
        for number in (1, 2, 3):
            (ran,) = json.loads(sent(filters, base, base, number).encoding)
    assert ran["spent"] == pytest.approx(4, rel=0.001)
    with pytest.raises(PrivacyBudgetError, match="for the job job"):
        sent(site(settings, base, replace(host, job="job/3")), base, base, 1)
    assert Ledger(tmp_path).spent("job", DELTA) == pytest.approx(4, rel=0.001)


@pytest.mark.parametrize(
    ("settings", "job", "text"),
    [
        ({"epsilon": 3, "noise_multiplier": 4.0}, {"rounds": 10}, "noise_multiplier 4 spends epsilon .* in 10 rounds"),
        ({"epsilon": 3, "noise_multiplier": 4.0, "at": "server_in"}, {"rounds": 10}, "the budget is 3"),
        (
            {"epsilon": 3, "noise_multiplier": 4.0},
            {"rounds": 10, "sites": 4, "fraction": 0.5},
            " updates of a site",
        ),
        ({"epsilon": 8}, {}, "from the number of rounds"),
        ({"epsilon": 8}, {"rounds": 4, "strategy": "fedbuff"}, "under FedBuff"),
        ({}, {"rounds": 4}, "neither a budget nor noise"),
    ],
)
def test_a_job_whose_budget_cannot_hold_is_refused_when_it_is_made(
    settings: dict[str, Any], job: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Job(app="train.py", filters=({"name": "GaussianDP", **settings},), **job)


def test_the_noise_that_the_refusal_names_is_enough() -> None:
    filters = {"name": "GaussianDP", "epsilon": 3, "noise_multiplier": 4.0}
    with pytest.raises(ConfigError) as caught:
        Job(app="train.py", rounds=10, filters=(filters,))
    noise = float(caught.value.fix.partition("it would be ")[2].partition(")")[0])
    assert independent((dp_accounting.GaussianDpEvent(noise / 2), 10)) == pytest.approx(3, rel=0.01)
    Job(app="train.py", rounds=10, filters=({**filters, "noise_multiplier": noise},))
    Job(app="train.py", rounds=2, filters=(filters,))


# -- the ledger ----------------------------------------------------------------------------------------------


def test_the_round_that_would_exceed_the_budget_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    base = {"w": np.zeros(5, np.float32)}
    per_round = [independent((dp_accounting.GaussianDpEvent(2.0), n)) for n in (1, 2, 3, 4)]
    settings = {"name": "GaussianDP", "noise_multiplier": 4.0, "epsilon": (per_round[2] + per_round[3]) / 2}
    home = FilterHost("site-1", "job", tmp_path)
    for number in (1, 2):
        leaves = sent(site(settings, base, home), base, base, number)
        (ran,) = json.loads(leaves.encoding)
        assert ran["spent"] == pytest.approx(per_round[number - 1], rel=0.01)
    again = site(settings, base, home)  # the process was killed: the ledger is not
    sent(again, base, base, 3)
    with pytest.raises(PrivacyBudgetError) as caught:
        again.received(Task("job", 4, "", "train", 3, base))
    text = str(caught.value)
    assert "the privacy budget of site-1 is spent: round 4" in text and "for the job job" in text
    assert str(tmp_path) in text
    assert len(Ledger(tmp_path).entries()) == 3
    other = SiteFilters([settings], (), FilterHost("site-1", "another job", tmp_path))
    other.agree(base)
    other.received(Task("another job", 1, "", "train", 0, base))


def test_a_budget_of_the_site_holds_over_all_jobs_and_all_filters(tmp_path: Path) -> None:
    base = {"w": np.zeros(5, np.float32)}
    settings = {"name": "GaussianDP", "noise_multiplier": 8.0}
    limit = BudgetLimit(PrivacyBudget(3.0, DELTA), "site-1", all_jobs=True)
    sent(site(settings, base, FilterHost("site-1", "first", tmp_path, budget=limit)), base, base)
    later = site({"name": "SVTPrivacy", "epsilon": 2.5}, base, FilterHost("site-1", "second", tmp_path, budget=limit))
    with pytest.raises(PrivacyBudgetError, match="for all jobs"):
        later.received(Task("second", 1, "", "train", 0, base))

    later.set_policy_filters(
        (), BudgetLimit(PrivacyBudget(30.0, DELTA), "site-1", all_jobs=True)
    )  # the policy was changed
    later.received(Task("second", 1, "", "train", 0, base))

    own = SiteFilters([], [{**settings, "epsilon": 1.6}], FilterHost("site-1", "third", tmp_path))
    own.agree(base)
    sent(own, base, base, 1)
    with pytest.raises(PrivacyBudgetError, match="for all jobs"):  # the first job's round counts too
        sent(own, base, base, 2)


def test_two_processes_cannot_spend_the_same_budget(tmp_path: Path) -> None:
    mechanism, limit = Mechanism("pure", 1.0), BudgetLimit(PrivacyBudget(5.5, 1e-9), "site-1")
    epsilon([mechanism], 1e-9)  # the import is not what is tested
    refused: list[PrivacyBudgetError] = []

    def spend() -> None:
        ledger = Ledger(tmp_path)
        for _ in range(3):
            try:
                ledger.spend("job", 1, "x", [mechanism], [limit])
            except PrivacyBudgetError as error:
                refused.append(error)
        ledger.close()

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(tmp_path).entries()) == 5 and len(refused) == 7


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(tmp_path: Path) -> None:
    (tmp_path / "privacy.sqlite").write_text("no database at all, but long enough to be looked at " * 40)
    with pytest.raises(StoreError, match="ledger"):
        site({"name": "GaussianDP", "noise_multiplier": 1.0}, {"w": np.zeros(1)}, FilterHost("site-1", "job", tmp_path))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"clip": 0}, "clip is 0"),
        ({"noise_multiplier": 0}, "noise_multiplier is 0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"epsilon": -1}, "epsilon is -1"),
        ({"adjacency": "add"}, "adjacency is 'add'"),
        ({"sampling": 0.5}, "adjacency zero"),
        ({"sampling": 0.5, "adjacency": "zero"}, "sampling is not secret at site_out"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_filters([{"name": "GaussianDP", "noise_multiplier": 1.0, **settings}])


def test_central_noise_needs_a_strategy_that_takes_a_mean() -> None:
    class Median(FedAvg):
        linear = False

    central = [{"name": "GaussianDP", "noise_multiplier": 1.0, "at": "server_in"}]
    check_filters(central, None, FedAvg())
    with pytest.raises(ConfigError, match="but Median needs the updates"):
        check_filters(central, None, Median())
    with pytest.raises(ConfigError, match="twice"):
        check_filters(central * 2)
    with pytest.raises(ConfigError, match="make GaussianDP the last"):
        check_filters([*central, {"name": "PercentilePrivacy", "at": "server_in"}])
