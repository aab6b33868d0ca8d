"""The plain loop, `with fl.connect() as site: for task in site.tasks(...)`: in a federation and alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Outcome, Place
from fl_runtime.errors import ConfigError, HandshakeError, QuorumError, StateMismatchError, UpdateRefusedError
from fl_runtime.types import Array, Arrays


def start() -> dict[str, Array]:
    return {"body": np.zeros(3), "head": np.zeros(2, np.float32)}


def loop(place: Place, amount: float = 1.0, **options: Any) -> Arrays:
    with fl.connect(kit=place.kit, **options) as site:
        for task in site.tasks(initial=start()):
            task.submit({n: a + amount for n, a in task.arrays.items()}, num_examples=place.index + 1)
        return site.arrays


def values(arrays: Arrays) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in arrays.items()}


# -- alone -----------------------------------------------------------------------------------------------------------


def test_alone_the_loop_runs_one_round_with_its_own_weights() -> None:
    with fl.connect() as site:
        assert (site.name, site.index, site.count, site.job) == ("local", 0, 1, "")
        rounds = []
        for task in site.tasks(initial=start()):
            rounds.append((task.round, task.rounds))
            task.arrays["body"] += 5
            task.report({"loss": 1.0}, 3)
            task.submit(task.arrays, num_examples=1, metrics={"train_loss": 0.5})
        site.report({"loss": 0.5}, 3)
    assert rounds == [(1, 1)]
    assert values(site.arrays) == {"body": [5.0] * 3, "head": [0.0] * 2}


def test_alone_the_number_of_rounds_is_the_scripts_and_the_initial_arrays_stay() -> None:
    mine = start()
    with fl.connect() as site:
        for task in site.tasks(initial=mine, rounds=3):
            task.submit({n: a + 1 for n, a in task.arrays.items()}, num_examples=1)
    assert site.arrays["body"].tolist() == [3.0] * 3
    assert mine["body"].tolist() == [0.0] * 3


def test_a_federation_can_be_required() -> None:
    with pytest.raises(ConfigError, match="required=True"):
        fl.connect(required=True)


# -- together --------------------------------------------------------------------------------------------------------


def test_every_site_ends_with_the_mean() -> None:
    with LocalFederation(sites=3, rounds=2) as federation:
        finals = federation.run(lambda place: loop(place, amount=place.index))
        assert len(federation.result().rounds) == 2
    # (0 * 1 + 1 * 2 + 2 * 3) / 6 a round
    for final in finals.values():
        np.testing.assert_allclose(final["body"], np.full(3, 2 * 8 / 6), rtol=1e-12)
        np.testing.assert_allclose(final["head"], np.full(2, 2 * 8 / 6), rtol=1e-6)
        assert final["head"].dtype == np.float32


def test_a_site_knows_where_it_is_and_its_tasks_how_far() -> None:
    def work(place: Place) -> tuple[object, ...]:
        with fl.connect(kit=place.kit) as site:
            seen = []
            for task in site.tasks(initial=start(), rounds=2):
                seen.append((task.round, task.rounds, sorted(task.arrays)))
                task.submit(task.arrays, num_examples=1)
            return site.name, site.index, site.count, site.job, fl.site(place.kit).name, seen

    with LocalFederation(sites=["x", "y"], name="hearts") as federation:
        told = federation.run(work)
    steps = [(1, 2, ["body", "head"]), (2, 2, ["body", "head"])]
    assert told == {"x": ("x", 0, 2, "hearts", "x", steps), "y": ("y", 1, 2, "hearts", "y", steps)}


def test_all_begin_from_the_first_sites_weights() -> None:
    def work(place: Place) -> list[float]:
        with fl.connect(kit=place.kit) as site:
            first: list[float] = []
            for task in site.tasks(initial={"w": np.full(2, 10.0 + place.index)}):
                first = first or task.arrays["w"].tolist()
                task.submit(task.arrays, num_examples=1)
            return first

    with LocalFederation(sites=3, rounds=2) as federation:
        assert list(federation.run(work).values()) == [[10.0, 10.0]] * 3


@pytest.mark.parametrize("submits", ["everything", "what travels"])
def test_what_is_kept_local_never_leaves(submits: str) -> None:
    def work(place: Place) -> Arrays:
        own = np.full(2, float(place.index), np.float32)
        with fl.connect(kit=place.kit, keep_local=["head"]) as site:
            for task in site.tasks(initial={**start(), "head": own}):
                assert sorted(task.arrays) == ["body"]
                result = {"body": task.arrays["body"] + 1}
                task.submit({**result, "head": own} if submits == "everything" else result, num_examples=1)
            return site.arrays

    with LocalFederation(sites=2, rounds=2) as federation:
        finals = federation.run(work)
        assert values(federation.model()) == {"body": [2.0] * 3}
    assert all(values(final) == {"body": [2.0] * 3} for final in finals.values())


def test_the_jobs_keep_local_holds_too_and_patterns_choose() -> None:
    with LocalFederation(sites=1, rounds=1, keep_local=("head",)) as federation:
        assert sorted(federation.run(loop)["site-1"]) == ["body"]
    with LocalFederation(sites=1, rounds=1) as federation:
        assert sorted(federation.run(lambda p: loop(p, exchange=["h*"]))["site-1"]) == ["head"]
    with LocalFederation(sites=1, rounds=1) as federation, pytest.raises(ConfigError, match="matches no tensor"):
        federation.run(lambda p: loop(p, keep_local=["haed"]))


def test_num_examples_of_the_script_overrides_that_of_the_loop() -> None:
    def work(place: Place) -> Arrays:
        return loop(place, amount=place.index, num_examples=5)

    with LocalFederation(sites=2, rounds=1) as federation:
        finals = federation.run(work)
        federation.result()  # by then all events have been told
        updates = [e.data["num_examples"] for e in federation.events if e.kind == "update"]
    assert updates == [5, 5]
    assert finals["site-1"]["body"].tolist() == [0.5] * 3


def test_reports_choose_the_best_round() -> None:
    def work(place: Place) -> None:
        losses = {1: 3.0, 2: 1.0, 3: 2.0}
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit({n: a + 1 for n, a in task.arrays.items()}, num_examples=1,
                            metrics={"loss": losses[task.round]})  # fmt: skip

    with LocalFederation(sites=2, rounds=3) as federation:
        federation.run(work)
        assert federation.result().best_round == 2
        assert federation.model("best")["body"].tolist() == [2.0] * 3


def test_the_loop_may_change_the_arrays_in_place_and_send_those() -> None:
    def work(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.arrays["body"] += 1
                task.arrays["head"] *= 0
                task.submit(task.arrays, num_examples=1)
            return site.arrays

    with LocalFederation(sites=2, rounds=3) as federation:
        assert all(f["body"].tolist() == [3.0] * 3 for f in federation.run(work).values())


def test_the_final_arrays_are_the_callers_own() -> None:
    with LocalFederation(sites=1, rounds=1) as federation:
        arrays = federation.run(loop)["site-1"]
    arrays["body"][...] = 7
    assert arrays["body"].tolist() == [7.0] * 3


def test_numbers_count_as_arrays() -> None:
    numbers: Any = {"bias": 0.5, "w": np.array([1.0, 2.0])}
    loss: Any = {"loss": np.float32(0.5)}

    def work(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=numbers):
                bias: Any = float(task.arrays["bias"])
                task.submit({"bias": bias, "w": task.arrays["w"]}, num_examples=1, metrics=loss)
            return site.arrays

    with LocalFederation(sites=1, rounds=1) as federation:
        assert values(federation.run(work)["site-1"]) == {"bias": 0.5, "w": [1.0, 2.0]}


# -- what goes wrong -------------------------------------------------------------------------------------------------


def outcomes_of(bad: Any, **settings: Any) -> dict[str, Outcome[Any]]:
    """Run site-1 well and site-2 with `bad`; return both outcomes."""
    with LocalFederation(sites=2, **{"rounds": 2, **settings}) as federation:
        return federation.outcomes({"site-1": loop, "site-2": bad}, check=False)


def assert_ended_by_site_2(found: dict[str, Outcome[Any]], reason: str) -> None:
    assert isinstance(found["site-1"].error, QuorumError)
    assert f"site-2: {reason}" in str(found["site-1"].error)


def labelled(place: Place, *labels: str, **options: Any) -> int:
    """One round of a site that says what its labels are; returns the number of its round."""
    with fl.connect(kit=place.kit, **options) as site:
        task = next(iter(site.tasks(initial={"w": np.zeros(2)}, agreement={"task": "pets", "labels": labels})))
        return task.round


def test_labels_in_another_order_are_refused_before_the_first_round() -> None:
    with LocalFederation(sites=2, rounds=1) as federation:
        orders = {"site-1": ("cat", "dog"), "site-2": ("dog", "cat")}
        work = {name: lambda place: labelled(place, *orders[place.name]) for name in orders}
        outcomes = federation.outcomes(work, check=False)
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert "labels: 0: 'cat' != 'dog', 1: 'dog' != 'cat'" in outcome.error.what
        assert "agree=False" in outcome.error.fix


def test_a_site_that_means_its_own_labels_joins_and_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    with LocalFederation(sites=2, rounds=1, min_sites=1) as federation:
        orders: dict[str, Any] = {"site-1": {}, "site-2": {"agree": False}}
        labels = {"site-1": ("cat", "dog"), "site-2": ("dog", "cat")}
        rounds = federation.run(lambda place: labelled(place, *labels[place.name], **orders[place.name]))
    assert rounds == {"site-1": 1, "site-2": 1}
    assert capfd.readouterr().err.count("agree=False: not compared with other sites: labels") == 1


@pytest.mark.parametrize(
    "given", [{"agree": {"labels": "cat"}}, {"agree": {"labels": 3}}, {"agree": ["cat"]}, {"agree": 1}], ids=str
)
def test_lists_to_agree_on_that_are_none_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="agree="):
        fl.connect(**given)


def test_further_lists_are_compared_where_the_script_gives_them() -> None:
    codes = {"site-1": np.array(["A", "B"]), "site-2": np.array(["B", "A"])}
    with LocalFederation(sites=2, rounds=1) as federation:
        work = {name: lambda place: labelled(place, "x", agree={"codes": codes[place.name]}) for name in codes}
        outcomes = federation.outcomes(work, check=False)
    assert all("codes: 0: 'A' != 'B'" in str(outcome.error) for outcome in outcomes.values())


def test_an_error_in_the_block_makes_the_site_leave_with_the_reason() -> None:
    def fails(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                if task.round == 2:
                    raise ValueError("out of memory")
                task.submit(task.arrays, num_examples=1)

    found = outcomes_of(fails)
    assert isinstance(found["site-2"].error, ValueError)
    assert_ended_by_site_2(found, "ValueError: out of memory")


def test_a_loop_that_stops_early_makes_the_site_leave() -> None:
    def breaks(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit(task.arrays, num_examples=1)
                break

    found = outcomes_of(breaks)
    assert found["site-2"].error is None
    assert_ended_by_site_2(found, "its loop ended before the last round")


def test_others_go_on_where_the_job_allows_it() -> None:
    def fails(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for _ in site.tasks(initial=start()):
                raise ValueError("broken")

    found = outcomes_of(fails, min_sites=1)
    assert found["site-1"].error is None
    assert isinstance(found["site-2"].error, ValueError)


def test_a_round_that_is_submitted_twice_is_refused() -> None:
    def twice(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=start()):
                task.submit(task.arrays, num_examples=1)
                task.submit(task.arrays, num_examples=1)

    found = outcomes_of(twice)
    assert isinstance(found["site-2"].error, ConfigError)
    assert "round 1 was submitted already" in str(found["site-2"].error)


@pytest.mark.parametrize("federated", [True, False])
def test_a_round_without_a_result_is_refused(federated: bool) -> None:
    def never(place: Place | None) -> None:
        with fl.connect(kit=place.kit if place else None) as site:
            for _ in site.tasks(initial=start()):
                pass

    if federated:
        found = outcomes_of(never)
        error = found["site-2"].error
        assert_ended_by_site_2(found, "ConfigError: round 1 ended without a result")
    else:
        with pytest.raises(ConfigError) as caught:
            never(None)
        error = caught.value
    assert isinstance(error, ConfigError)
    assert "task.submit" in error.fix


def submitting(arrays: Arrays, num_examples: int = 1, **options: Any) -> Any:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit, **options) as site:
            for task in site.tasks(initial=start()):
                task.submit(arrays, num_examples=num_examples)

    return work


@pytest.mark.parametrize(
    ("arrays", "kind", "said"),
    [
        ({"body": np.zeros(3)}, StateMismatchError, "head: float32[2] != missing"),
        ({}, StateMismatchError, "missing"),
        ({**start(), "more": np.zeros(1)}, StateMismatchError, "more: missing != float64[1]"),
        ({**start(), "body": np.zeros(4)}, StateMismatchError, "body: float64[3] != float64[4]"),
        ({**start(), "head": np.zeros(2)}, StateMismatchError, "head: float32[2] != float64[2]"),
        ({**start(), "body": np.array([0, np.nan, 0])}, UpdateRefusedError, "NaN or infinite values in body"),
    ],
)
def test_results_that_do_not_fit_are_refused_at_the_site(arrays: Arrays, kind: type[Exception], said: str) -> None:
    error = outcomes_of(submitting(arrays))["site-2"].error
    assert isinstance(error, kind)
    assert said in str(error)


@pytest.mark.parametrize("number", [0, -1])
def test_results_without_examples_are_refused(number: int) -> None:
    error = outcomes_of(submitting(start(), num_examples=number))["site-2"].error
    assert isinstance(error, UpdateRefusedError)
    assert f"num_examples is {number}" in str(error)


def test_no_initial_arrays_are_refused() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for _ in site.tasks(initial={}):
                pass

    assert "got no arrays" in str(outcomes_of(work)["site-2"].error)


def test_tensors_that_cannot_travel_are_named() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for _ in site.tasks(initial={"labels": np.array(["a", "b"])}):
                pass

    assert "'labels'" in str(outcomes_of(work)["site-2"].error)


def test_a_loop_that_is_begun_again_goes_on_as_a_new_attempt() -> None:
    """In a notebook a cell is interrupted within a round and run again; the others wait for it."""

    def interrupted(place: Place) -> Arrays:
        site = fl.connect(kit=place.kit)
        tasks = site.tasks(initial=start())
        next(tasks)
        return loop(place)

    with LocalFederation(sites=2, rounds=2) as federation:
        outcomes = federation.outcomes({"site-1": loop, "site-2": interrupted})
        joined = [e.data["attempt"] for e in federation.events if e.kind == "joined" and e.site == "site-2"]
    assert joined == [1, 2]
    finals = [outcome.value for outcome in outcomes.values()]
    assert all(final is not None and final["body"].tolist() == [2.0] * 3 for final in finals)


# -- what is told at the site, alone and together --------------------------------------------------------------------


def drifting(place: Place | None) -> None:
    """Do what makes float32 weights float64: multiply with a list's mean, which is float64."""
    with fl.connect(kit=place.kit if place else None) as site:
        for task in site.tasks(initial=start()):
            task.submit({n: a * np.mean([0.5, 1.5]) + np.ones(a.shape) for n, a in task.arrays.items()}, num_examples=1)


@pytest.mark.parametrize("federated", [True, False])
def test_a_dtype_that_drifts_is_told_with_the_fix_before_anything_is_sent(federated: bool) -> None:
    if federated:
        with LocalFederation(sites=1, rounds=2) as federation:
            error = federation.outcomes({"site-1": drifting}, check=False)["site-1"].error
            assert not [event for event in federation.events if event.kind == "update" and event.round]
    else:
        with pytest.raises(StateMismatchError) as caught:
            drifting(None)
        error = caught.value
    assert isinstance(error, StateMismatchError)
    assert "head: float32[2] != float64[2]" in error.what and "body" not in error.what
    assert error.where == "task.submit(...), round 1"
    assert "'head' has become float64" in error.fix and "array.astype('float32')" in error.fix


class Unreadable:
    """What a tensor with a gradient does when NumPy asks for its values."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad")


BAD: dict[str, tuple[Any, str]] = {
    "a list of arrays": ([np.zeros(3), np.zeros(2, np.float32)], "got a list instead of a dict"),
    "an array": (np.zeros(3), "got a ndarray instead of a dict"),
    "nothing": (None, "got a NoneType instead of a dict"),
    "a list of numbers": ({**start(), "body": [0.0, 1.0, 2.0]}, "'body' is a list, not an array"),
    "a ragged list": ({**start(), "body": [[0.0], [1.0, 2.0]]}, "'body' is a list, not an array"),
    "no value": ({**start(), "body": None}, "'body' is a NoneType, not an array"),
    "a text": ({**start(), "body": "0.5"}, "'body' is a str, not an array"),
    "an object": ({**start(), "body": object()}, "'body' is a object, not an array of numbers"),
    "a tensor that NumPy cannot read": ({**start(), "body": Unreadable()}, "Unreadable that NumPy cannot read"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", ["initial", "submit"])
@pytest.mark.parametrize("federated", [True, False])
def test_what_is_no_dict_of_arrays_is_refused_in_words(bad: str, at: str, federated: bool) -> None:
    value, said = BAD[bad]

    def work(place: Place | None) -> None:
        with fl.connect(kit=place.kit if place else None) as site:
            for task in site.tasks(initial=value if at == "initial" else start()):
                task.submit(value, num_examples=1)

    if federated:
        with LocalFederation(sites=1, rounds=1) as federation:
            error = federation.outcomes({"site-1": work}, check=False)["site-1"].error
    else:
        with pytest.raises(ConfigError) as caught:
            work(None)
        error = caught.value
    assert isinstance(error, ConfigError)
    assert said in error.what
    assert at in str(error) and error.fix


@pytest.mark.parametrize("rounds", [0, -1, 2.5, True, "3"])
def test_a_number_of_rounds_that_cannot_be_is_refused(rounds: Any) -> None:
    with fl.connect() as site, pytest.raises(ConfigError, match="is not a number of rounds"):
        next(site.tasks(initial=start(), rounds=rounds))


def test_alone_the_same_tensors_are_handed_out_as_in_a_federation() -> None:
    with fl.connect(keep_local=["head"]) as site:
        for task in site.tasks(initial=start(), rounds=2):
            assert sorted(task.arrays) == ["body"]
            task.submit({**start(), "body": task.arrays["body"] + 1}, num_examples=1)
    assert values(site.arrays) == {"body": [2.0] * 3}
