"""`fl.sums` in jobs with `secure_sum`: the totals of plain sums, and nothing of a single site at the server."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_process import server_process
from study import until

import fl_adapters as fl
from fl_adapters.loop.federation import large_union
from fl_adapters.loop.masked_union import masked_union
from fl_adapters.participant.kit import Kit
from fl_adapters.testing import Death, LocalFederation, Place
from fl_runtime.aggregation.sums.call import Call
from fl_runtime.errors import ConfigError, ProtocolError, SiteFailedError, StateMismatchError
from fl_runtime.types import Array

NAMES = ("site-1", "site-2", "site-3", "site-4")
CALLS = 3


def values(index: int, number: int) -> dict[str, Any]:
    """A site's values of a call, of very different sizes, and as small as 1e-21."""
    rng = np.random.default_rng([index, number])
    wide = rng.normal(size=(number, 3)) * 10.0 ** rng.integers(-20, 30, size=(number, 3))
    return {"z": wide, "count": 10 * index + number, "a": np.full((), 0.1 * (index + 1))}


def totals(place: Place, before: Callable[[int], None] = lambda number: None) -> list[dict[str, Array]]:
    with fl.sums(kit=place.kit) as federation:
        found = []
        for number in range(1, CALLS + 1):
            before(number)
            found.append(federation.sum(values(place.index, number)))
        return found


def assert_exact(found: list[dict[str, Array]], indices: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """The totals are the exact sums, rounded once."""
    exact = np.vectorize(lambda *terms: math.fsum(terms), otypes=[float])
    for number, total in enumerate(found, 1):
        parts = [values(index, number) for index in indices]
        assert list(total) == list(parts[0])
        for name, array in total.items():
            expected = exact(*(part[name] for part in parts))
            assert array.shape == expected.shape
            np.testing.assert_allclose(array, expected, rtol=2**-52, atol=0)


def bits(found: list[dict[str, Array]]) -> bytes:
    return b"".join(array.tobytes() for total in found for array in total.values())


@pytest.mark.parametrize("sockets", [False, True])
def test_masked_totals_are_the_exact_sums_with_the_same_bits_at_all_sites(sockets: bool) -> None:
    with LocalFederation(sites=4, secure_sum=True, sockets=sockets) as federation:
        found = federation.run(totals)
        result = federation.result()
        events = [event for event in federation.events if event.kind == "round_finished"]
    assert_exact(found["site-1"])
    assert len({bits(each) for each in found.values()}) == 1
    assert len(result.rounds) == CALLS + 1  # the last one is the end of the block
    assert all(event.data["sites"] == NAMES and event.data["num_examples"] == 4 for event in events)


def test_the_server_stores_uniform_bytes_and_no_text() -> None:
    """Constant values: every byte of what is stored of them is as likely as any other."""
    size = 50_000
    counts = np.zeros(256)

    def stored() -> Path | None:
        found = (path for path in federation.folder.rglob("update-1-0*") if path.stat().st_size >= 32 * size)
        return next(found, None)

    def work(place: Place) -> tuple[float, list[str]]:
        with fl.sums(kit=place.kit) as sums:
            if place.index == 1:  # its values are missing, so those of site-1 are still there
                until(lambda: any(e.kind == "update" and e.site == "site-1" for e in federation.events), "an update")
                path = stored()
                assert path is not None
                counts[:] = np.bincount(np.fromfile(path, np.uint8, 32 * size), minlength=256)
            total = float(sums.sum({"x": np.full(size, 0.5)})["x"][0])
            return total, sums.union([f"only {place.name} knows"])

    with LocalFederation(sites=3, secure_sum=True) as federation:
        found = federation.run(work)
        journal = b"".join(path.read_bytes() for path in federation.folder.rglob("journal*"))
    assert set(map(repr, found.values())) == {repr((1.5, [f"only {name} knows" for name in NAMES[:3]]))}
    expected = 32 * size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 0 < chi_square < 255 + 6 * np.sqrt(2 * 255), "six standard deviations: one run in a billion fails by chance"
    assert b"only site-1" not in journal


def test_integers_are_exact_in_a_quarter_of_the_bytes() -> None:
    def work(place: Place) -> tuple[Array, Array]:
        mine = np.array([2.0**53 - 1, -(2.0**53) + 1, 0, place.index] * 5_000)
        with fl.sums(kit=place.kit) as federation:
            with pytest.raises(ConfigError, match="'x' holds 0.5, which is no whole number"):
                federation.sum({"x": [1, 0.5]}, integers=True)
            return federation.sum({"x": mine}, integers=True)["x"], federation.sum({"x": mine})["x"]

    with LocalFederation(sites=3, secure_sum=True) as federation:
        found = federation.run(work)
        sent = [event.data["bytes_up"] for event in federation.events if event.kind == "update"]
    expected = np.array([float(3 * (2**53 - 1)), -float(3 * (2**53 - 1)), 0, 3] * 5_000)
    assert all(np.array_equal(total, expected) for totals in found.values() for total in totals)
    small, large = sorted(sent)[3], sorted(sent)[-1]  # the calls that end the block are the smallest
    assert 8 * 20_000 <= small < 8 * 20_000 + 5_000 and large >= 32 * 20_000


def test_a_mismatch_is_an_error_at_every_site_that_names_the_odd_one() -> None:
    def work(place: Place) -> None:
        with fl.sums(kit=place.kit) as federation:
            federation.sum({"x": np.zeros(4 if place.index == 1 else 3)})

    with LocalFederation(sites=3, secure_sum=True) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES[:3], work), check=False)
    for outcome in outcomes.values():
        assert isinstance(outcome.error, StateMismatchError)
        assert "site-2: 'x' is of shape [4], but of shape [3] at site-1" in outcome.error.what


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e37, "'x' holds 1e\\+37, and values of sums go up to 1e\\+36"), (np.zeros(2**22 + 1), "limit")],
)
def test_what_a_masked_sum_does_not_take_is_named_before_it_leaves(value: Any, text: str) -> None:
    def work(place: Place) -> float:
        with fl.sums(kit=place.kit) as federation:
            with pytest.raises(ConfigError, match=text):
                federation.sum({"x": value})
            return float(federation.sum({"n": 1})["n"])

    with LocalFederation(sites=2, secure_sum=True) as federation:
        assert set(federation.run(work).values()) == {2.0}


def test_values_that_do_not_fit_their_call_cost_their_sender_alone() -> None:
    def work(place: Place) -> float:
        with fl.sums(kit=place.kit) as federation:
            if place.index == 1:
                federation._exchange(Call("sum", (("x", (3,)),)), np.zeros(2), {})
            return float(federation.sum({"x": np.ones(3)})["x"][0])

    with LocalFederation(sites=4, min_sites=3, rejoin_s=1.5, secure_sum=True) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES, work), check=False)
    assert {name: outcome.value for name, outcome in outcomes.items()} == dict.fromkeys(NAMES, 3.0) | {"site-2": None}


@pytest.mark.parametrize("number", [3, 4, 5])  # before its values, before its shares of the masks, in the second call
def test_a_script_that_dies_and_is_started_again_gets_the_totals(number: int) -> None:
    def work(place: Place) -> list[dict[str, Array]]:
        try:
            return totals(place)
        except SiteFailedError:
            return totals(place)

    with LocalFederation(sites=4, secure_sum=True, deaths=[Death("site-2", "Submit", number)]) as federation:
        found = federation.run(work)
        assert len(federation.result().rounds) == CALLS + 1
    assert_exact(found["site-2"])
    assert len({bits(each) for each in found.values()}) == 1


def test_the_others_go_on_without_a_site_that_died() -> None:
    deaths = [Death("site-2", "Submit", 3)]
    with LocalFederation(sites=4, min_sites=3, rejoin_s=1.5, secure_sum=True, deaths=deaths) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES, totals), check=False)
        federation.result()
    for name in ("site-1", "site-3", "site-4"):
        value = outcomes[name].value
        assert value is not None
        assert_exact(value, (0, 2, 3))


def test_a_server_killed_in_the_middle_gives_the_same_totals(tmp_path: Path) -> None:
    with server_process(tmp_path, 4, secure_sum=True) as server:

        def place(name: str) -> Place:
            kit = Kit("test", name, NAMES.index(name), 4, server.address, f"secret of {name}", str(tmp_path), True)
            return Place(name, kit.index, 4, str(kit.save(tmp_path / "kits" / name)))

        def kill(number: int) -> None:
            if number == 2:
                server.kill()
                server.start()

        found: dict[str, list[dict[str, Array]]] = {}

        def work(name: str) -> None:
            found[name] = totals(place(name), kill if name == "site-2" else lambda number: None)

        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(found) == set(NAMES)
        for each in found.values():
            assert_exact(each)


# -- what stands on sums ---------------------------------------------------------------------------------------------


def test_statistics_are_those_of_pandas() -> None:
    from fl_adapters.statistics import Statistics, describe

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.integers(18, 95, 900), "sex": rng.choice(["f", "m", "d"], 900)})
    frame["dose"] = rng.lognormal(0, 3, 900)

    def work(place: Place) -> Statistics:
        with fl.sums(kit=place.kit) as federation:
            return describe(frame.iloc[place.index :: 3].reset_index(drop=True), federation=federation)

    with LocalFederation(sites=3, secure_sum=True) as federation:
        found = federation.run(work)["site-2"]
    assert found.rows == 900
    for name in ("age", "dose"):
        feature, column = found.features[name], frame[name]
        np.testing.assert_allclose([feature.mean, feature.std], [column.mean(), column.std()], rtol=1e-12)
        np.testing.assert_allclose(
            list(feature.quantiles.values()), column.quantile(list(feature.quantiles)), rtol=1e-12
        )
    assert found.features["sex"].categories == dict(frame["sex"].value_counts())


def test_an_estimator_is_that_of_all_rows_together() -> None:
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression as Central
    from sklearn.preprocessing import StandardScaler as CentralScaler

    from fl_adapters.sklearn import LogisticRegression, StandardScaler, over

    data, target = load_breast_cancer(return_X_y=True)

    def work(place: Place) -> Array:
        own, labels = data[place.index :: 3], target[place.index :: 3]
        with fl.sums(kit=place.kit) as federation, over(federation):
            coefficients: Array = LogisticRegression().fit(StandardScaler().fit_transform(own), labels).coef_
        return coefficients

    with LocalFederation(sites=3, secure_sum=True) as federation:
        found = federation.run(work)
    central = Central(solver="newton-cholesky", tol=1e-12).fit(CentralScaler().fit_transform(data), target)
    np.testing.assert_allclose(found["site-1"], central.coef_, atol=1e-6)


# -- unions ----------------------------------------------------------------------------------------------------------


def unite(*own: list[str], spoil: Callable[[Mapping[str, Array]], None] = lambda totals: None) -> list[list[str]]:
    """Unite the texts of sites, each in a thread of its own whose sums wait for the others."""
    parts: list[Mapping[str, Array]] = [{} for _ in own]
    barrier = threading.Barrier(len(own))
    found: list[list[str]] = [[] for _ in own]
    errors: list[ProtocolError] = []

    def site(index: int) -> None:
        def summed(arrays: Mapping[str, Array]) -> dict[str, Array]:
            parts[index] = arrays
            barrier.wait(60)
            total = {name: np.sum([part[name] for part in parts], axis=0) for name in arrays}
            barrier.wait(60)
            spoil(total)
            return total

        try:
            found[index] = masked_union(summed, own[index])
        except ProtocolError as error:
            errors.append(error)

    threads = [threading.Thread(target=site, args=(index,), daemon=True) for index in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return found


TEXTS = st.lists(st.text(max_size=20) | st.sampled_from(["", "a", "a\0", "a\x01", "ä" * 1000]), max_size=30)


@settings(max_examples=12, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=3))
def test_a_union_out_of_sums_is_that_of_the_sets(own: list[list[str]]) -> None:
    assert unite(*own) == [sorted(set().union(*own))] * len(own)


def test_a_large_union_takes_several_sums() -> None:
    own = [[f"category {number:06} of a long name" for number in range(start, start + 40_000)] for start in (0, 20_000)]
    assert unite(*own)[0] == sorted({*own[0], *own[1]})


@pytest.mark.parametrize("noise", [1.0, -1.0, 2.0**40])
def test_a_total_that_holds_no_texts_is_an_error(noise: float) -> None:
    def spoil(totals: Mapping[str, Array]) -> None:
        for array in totals.values():
            if array.ndim == 2:
                array += noise

    with pytest.raises(ProtocolError, match="cannot be read after 8 sums"):
        unite(["a", "b"], ["b", "c"], spoil=spoil)


def test_unions_of_any_number_of_texts_work_over_masked_sums() -> None:
    def work(place: Place) -> list[str]:
        with fl.sums(kit=place.kit) as federation:
            return sorted(large_union(federation, [f"text {n}" for n in range(place.index, 200, 2)]))

    with LocalFederation(sites=3, secure_sum=True) as federation:
        found = federation.run(work)
    assert set(map(tuple, found.values())) == {tuple(sorted(f"text {n}" for n in range(200)))}
