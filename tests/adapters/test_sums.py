"""`with fl.sums() as federation`: totals and unions over all sites, their failures, deaths and restarts."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from server_process import server_process

import fl_adapters as fl
from fl_adapters.environments.progress.lines import ProgressLines
from fl_adapters.environments.progress.screen import run_screen
from fl_adapters.environments.progress.view import RunView
from fl_adapters.loop.replay import Replay
from fl_adapters.participant.kit import Kit
from fl_adapters.testing import Death, LocalFederation, Outcome, Place
from fl_runtime.aggregation.sums.call import MAX_TEXTS, Call, pack_texts, packed, read_texts
from fl_runtime.errors import (
    ConfigError,
    FederationError,
    HandshakeError,
    ProtocolError,
    QuorumError,
    SiteFailedError,
    StateMismatchError,
    UpdateRefusedError,
)
from fl_runtime.types import Array, Event, Task

NAMES = ("site-1", "site-2", "site-3")
CALLS = 12


def values(place: Place, number: int) -> dict[str, Any]:
    """A site's values of a call: other shapes in each call, and numbers whose sum depends on the order."""
    rng = np.random.default_rng([place.index, number])
    wide = rng.normal(size=(number, 3)) * 10.0 ** rng.integers(-8, 8, size=(number, 3))
    return {"z": wide, "count": 10 * place.index + number, "a": np.full((), 0.1 * (place.index + 1))}


def totals(place: Place, calls: int = CALLS, before: Callable[[int], None] | None = None) -> list[dict[str, Array]]:
    with fl.sums(kit=place.kit) as federation:
        found = []
        for number in range(1, calls + 1):
            if before is not None:
                before(number)
            found.append(federation.sum(values(place, number)))
            assert federation.sites_in_last_sum == NAMES
        return found


def oracle(number: int) -> dict[str, Array]:
    parts = [values(Place(name, index, 3, ""), number) for index, name in enumerate(NAMES)]
    exact = np.vectorize(lambda *terms: math.fsum(terms), otypes=[float])
    return {name: exact(*(part[name] for part in parts)) for name in parts[0]}


def bits(found: list[dict[str, Array]]) -> list[dict[str, bytes]]:
    return [{name: array.tobytes() for name, array in total.items()} for total in found]


@pytest.fixture(scope="module")
def expected() -> list[dict[str, bytes]]:
    """The bits of the totals in an undisturbed run."""
    with LocalFederation(sites=3) as federation:
        return bits(federation.run(totals)["site-1"])


# -- totals ----------------------------------------------------------------------------------------------------------


def test_totals_are_the_exact_sums_with_the_same_bits_at_all_sites(expected: list[dict[str, bytes]]) -> None:
    with LocalFederation(sites=3, rounds=2, late="carry", exact_restart=True) as federation:
        found = federation.run(totals)
        result = federation.result()
    for number, total in enumerate(found["site-2"], 1):
        assert list(total) == ["z", "count", "a"]
        for name, array in oracle(number).items():
            assert total[name].dtype == np.float64 and total[name].shape == array.shape
            np.testing.assert_allclose(total[name], array, rtol=1e-15)
    assert all(bits(totals) == expected for totals in found.values())
    assert len(result.rounds) == CALLS + 1  # the last one is the end of the block
    assert (result.no_best, federation.server.export(federation.folder / "model")) == ("", None)


def test_integers_are_exact_and_the_callers_arrays_stay() -> None:
    large = 2**53 - 5

    def work(place: Place) -> float:
        mine = np.array([large if place.index == 0 else 1])
        with fl.sums(kit=place.kit) as federation:
            total = federation.sum({"n": mine})["n"]
        assert mine.dtype == np.int64 and mine[0] in (large, 1)
        total += 0  # it is the caller's
        return float(total[0])

    with LocalFederation(sites=3) as federation:
        assert federation.run(work) == dict.fromkeys(NAMES, 2.0**53 - 3)


def test_a_union_is_sorted_and_each_block_is_a_training_of_its_own() -> None:
    own = {"site-1": ["red", "ä\n", "red"], "site-2": [], "site-3": ["green"]}

    def work(place: Place) -> tuple[list[str], fl.Site, fl.Site, float]:
        with fl.sums(kit=place.kit) as federation:
            names, first = federation.union(own[place.name]), federation.site
        with fl.sums(kit=place.kit) as federation:
            return names, first, federation.site, float(federation.sum({"n": 1})["n"])

    with LocalFederation(sites=3) as federation:
        for name, (names, first, second, count) in federation.run(work).items():
            assert names == ["green", "red", "ä\n"] and count == 3
            assert (first.name, first.count, first.job, second.job) == (name, 3, "test", "test/2")


def test_settings_about_models_do_not_disturb_sums_and_hold_for_the_training_after_them() -> None:
    def work(place: Place) -> tuple[float, float]:
        with fl.sums(kit=place.kit) as federation:
            mean = float(federation.sum({"x": place.index})["x"]) / federation.site.count
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(2)}):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
        return mean, float(site.arrays["w"][0])

    with LocalFederation(sites=3, rounds=2, strategy="swarm", best_metric="loss") as federation:
        assert federation.run(work) == dict.fromkeys(NAMES, (1.0, 2.0))


def test_alone_sums_are_the_sites_own_values() -> None:
    with fl.sums(agree={"what": "x"}) as federation:
        total = federation.sum({"n": 3, "x": np.float32([1, 2])})
        assert federation.union(["b", "a", "b"]) == ["a", "b"]
        assert federation.site == fl.Site("local", 0, 1, "") and federation.sites_in_last_sum == ("local",)
    assert (float(total["n"]), total["x"].tolist(), total["x"].dtype) == (3.0, [1.0, 2.0], np.float64)
    with pytest.raises(ConfigError, match="required=True"), fl.sums(required=True):
        pass


# -- mistakes --------------------------------------------------------------------------------------------------------


def disagreement(*calls: Callable[[Any], object], **settings: Any) -> dict[str, BaseException]:
    """Let each site make a call of its own, and return their errors."""

    def work(place: Place) -> None:
        with fl.sums(kit=place.kit) as federation:
            federation.sum({"n": 1})
            calls[place.index](federation)

    with LocalFederation(sites=3, **settings) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES, work), check=False)
    assert all(outcome.error is not None for outcome in outcomes.values())
    return {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        (lambda f: f.sum({"x": np.zeros(4)}), r"site-2: 'x' is of shape \[4\], but of shape \[3\] at site-1"),
        (lambda f: f.sum({"y": np.zeros(3)}), r"site-2: 'y' is of shape \[3\], but missing at site-1"),
        (lambda f: f.union(["x"]), r"site-2: calls union\(...\), but site-1 calls sum\(...\)"),
        (lambda f: None, r"site-2: has left its block, but site-1 calls sum\(...\)"),
    ],
)
def test_a_mismatch_is_an_error_at_every_site_that_names_the_odd_one(odd: Callable[[Any], object], line: str) -> None:
    def usual(federation: Any) -> object:
        return federation.sum({"x": np.zeros(3)})

    for error in disagreement(usual, odd, usual).values():
        assert isinstance(error, StateMismatchError)
        assert re.search(line, error.what)
        assert "call 2" in error.where


def test_what_the_sites_agree_on_is_compared_at_the_start() -> None:
    def work(place: Place) -> None:
        with fl.sums(kit=place.kit, agree={"what": "mean", "bins": place.index // 2}):
            pass

    with LocalFederation(sites=3) as federation, pytest.raises(HandshakeError, match="bins: 0 != 1"):
        federation.run(work)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: f.sum([1, 2]), "sum got a list"),
        (lambda f: f.sum({"x": [math.nan]}), "'x' holds values that are not finite"),
        (lambda f: f.sum({"x": 1j}), "'x' has the dtype complex128"),
        (lambda f: f.sum({"x": "1"}), "'x' has the dtype <U1"),
        (lambda f: f.sum({"x": 2**53}), "integer of 2\\^53 or more"),
        (lambda f: f.sum({"x": 2**70}), "'x' has the dtype object"),
        (lambda f: f.sum({"": 1}), "'' is no name"),
        (lambda f: f.sum({3: 1}), "3 is no name"),
        (lambda f: f.sum({"x": np.zeros(2**24 + 1)}), "the limit is"),
        (lambda f: f.union("red"), "union\\('red'\\) got a text"),
        (lambda f: f.union(["a", 3]), "union got 3, a int"),
        (lambda f: f.sum({"x": [1.0, -1e200]}), "'x' holds 1e\\+200"),
        (lambda f: f.union(["a" * 1001]), "more than 1000 characters"),
        (lambda f: f.union(["\ud800"]), "cannot be encoded in UTF-8"),
    ],
)
def test_what_cannot_be_summed_is_named(call: Callable[[Any], object], text: str) -> None:
    with fl.sums() as federation, pytest.raises(ConfigError, match=text):
        call(federation)


def test_calls_outside_the_block_are_refused() -> None:
    federation = fl.sums()
    with pytest.raises(ConfigError, match="need an open block"):
        federation.sum({"n": 1})
    with federation, pytest.raises(ConfigError, match="open already"):
        federation.__enter__()


@pytest.mark.parametrize("name", ["TopK", "GaussianDP", "Quantize"])
def test_filters_that_work_on_weights_are_refused_with_the_reason(name: str) -> None:
    arguments = {
        "TopK": {"ratio": 0.1},
        "GaussianDP": {"clip": 1.0, "noise_multiplier": 1.0},
        "Quantize": {"to": "int8"},
    }
    filters = ({"name": name, "at": "site_out", **arguments[name]},)
    with LocalFederation(sites=3, filters=filters) as federation, pytest.raises(ConfigError, match=f"{name} works on"):
        federation.run(totals)


# -- sites that fail, and servers ------------------------------------------------------------------------------------


def test_a_site_that_leaves_its_block_with_an_error_leaves_the_run() -> None:
    def work(place: Place) -> tuple[float, tuple[str, ...]]:
        with fl.sums(kit=place.kit) as federation:
            federation.sum({"n": 1})
            if place.index == 1:
                raise ZeroDivisionError
            return float(federation.sum({"n": 1})["n"]), federation.sites_in_last_sum

    with LocalFederation(sites=3, min_sites=2) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES, work), check=False)
        federation.result()
    assert isinstance(outcomes["site-2"].error, ZeroDivisionError)
    assert outcomes["site-1"].value == outcomes["site-3"].value == (2.0, ("site-1", "site-3"))


@pytest.mark.parametrize(
    "death",
    [
        Death("site-2", "Submit", 5),
        Death("site-2", "Submit", 5, heard=True),
        Death("site-2", "Next", 6),
        Death("site-2", "Next", 6, heard=True),
        Death("site-2", "Submit", CALLS + 1, heard=True),
    ],
)
def test_a_script_started_again_gets_the_totals_of_the_calls_it_made(
    death: Death, expected: list[dict[str, bytes]]
) -> None:
    def work(place: Place) -> list[dict[str, bytes]]:
        try:
            return bits(totals(place))
        except SiteFailedError:
            return bits(totals(place))

    with LocalFederation(sites=3, deaths=[death]) as federation:
        assert federation.run(work) == dict.fromkeys(NAMES, expected)
        assert len(federation.result().rounds) == CALLS + 1


def test_a_script_that_died_in_its_second_block_goes_through_the_first_one_again() -> None:
    deaths = [Death("site-2", "Submit", 3 + 1 + 2, heard=True)]  # three calls and the end of a block, then two calls

    def work(place: Place) -> list[list[dict[str, bytes]]]:
        return [bits(totals(place, 3)) for _ in range(2)]

    with LocalFederation(sites=3, deaths=deaths) as federation:
        found: dict[str, Outcome[list[list[dict[str, bytes]]]]] = {}
        others = threading.Thread(
            target=lambda: found.update(federation.outcomes({"site-1": work, "site-3": work})), daemon=True
        )
        others.start()
        assert isinstance(federation.outcomes({"site-2": work}, check=False)["site-2"].error, SiteFailedError)
        again = federation.outcomes({"site-2": work})["site-2"].value  # as a new process: it knows of no session
        others.join(60)
    assert again is not None and again == found["site-1"].value == found["site-3"].value


def test_a_site_that_missed_a_call_is_refused_and_the_others_go_on() -> None:
    apart = threading.Event()

    def work(place: Place) -> float:
        if place.index == 2:
            assert apart.wait(60)
        with fl.sums(kit=place.kit) as federation:
            federation.sum({"n": 1})
            federation.sum({"n": 1})
            total = federation.sum({"n": 1})["n"]
            if place.index < 2:
                apart.set()
                late.wait(60)
            return float(total)

    late = threading.Event()

    def latecomer(place: Place) -> float:
        try:
            return work(place)
        finally:
            late.set()

    with LocalFederation(sites=3, min_sites=2, join_s=0.0) as federation:
        outcomes = federation.outcomes({"site-1": work, "site-2": work, "site-3": latecomer}, check=False)
        federation.result()
    error = outcomes["site-3"].error
    assert isinstance(error, QuorumError) and "no result of call 1" in error.what and "are at call 4" in error.what
    assert outcomes["site-1"].value == outcomes["site-2"].value == 2.0


def test_a_late_site_gets_the_total_without_its_own_values() -> None:
    closed = threading.Event()

    def work(place: Place) -> list[tuple[float, int]]:
        with fl.sums(kit=place.kit) as federation:
            found = []
            for _ in range(2):
                if place.index == 2:
                    assert closed.wait(60)
                found.append((float(federation.sum({"n": 1})["n"]), len(federation.sites_in_last_sum)))
                closed.set()
            return found

    with LocalFederation(sites=3, min_sites=2, deadline_s=1.0) as federation:
        assert set(map(tuple, federation.run(work).values())) == {((2.0, 2), (3.0, 3))}


def test_results_that_a_death_cut_off_are_dropped(tmp_path: Path) -> None:
    def task(version: int) -> Task:
        arrays = {"values": np.full(2, version, float), "call": Call("sum", (("x", (2,)),)).to_array()}
        return Task("test", version + 1, "", "train", version, arrays, {"sites": packed(["site-1"])})

    path = tmp_path / "sums.bin"
    with closing(Replay(path)) as replay:
        for version in (1, 2):
            replay.learn(task(version))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"x", whole[: len(whole) // 2 + 10]):
        path.write_bytes(damaged)
        with closing(Replay(path, fresh=False)) as replay:
            assert (replay.knows(1), replay.knows(2)) == (True, False)
            assert replay.result(1).values.tolist() == [1.0, 1.0] and replay.result(1).sites == ("site-1",)
            replay.learn(task(2))
        assert path.read_bytes() == whole
    with closing(Replay(path)) as replay:  # of another run
        assert not replay.knows(1)


@pytest.mark.parametrize(
    "wrong",
    [{"values": np.zeros(3)}, {"values": np.array([math.nan, 1.0])}, {"sites": packed({"a": 1})}, {"call": packed([])}],
)
def test_a_total_that_does_not_fit_is_refused_by_the_site(wrong: dict[str, Array]) -> None:
    parts = {"values": np.zeros(2), "call": Call("sum", (("x", (2,)),)).to_array(), "sites": packed(["site-1"])}
    with pytest.raises(ProtocolError, match="the server sends a total that cannot be read"):
        Replay(None).learn(Task("test", 2, "", "train", 1, parts | wrong))


def test_a_server_killed_in_the_middle_gives_the_same_totals(tmp_path: Path, expected: list[dict[str, bytes]]) -> None:
    with server_process(tmp_path, 3) as server:

        def place(name: str) -> Place:
            kit = Kit("test", name, NAMES.index(name), 3, server.address, f"secret of {name}", str(tmp_path), True)
            return Place(name, kit.index, 3, str(kit.save(tmp_path / "kits" / name)))

        def kill(number: int) -> None:
            if number in (2, 7):
                server.kill()
                server.start()

        found: dict[str, list[dict[str, Array]]] = {}

        def work(name: str) -> None:
            found[name] = totals(place(name), before=kill if name == "site-2" else None)
            with fl.sums(kit=place(name).kit) as federation:
                federation.sum({"n": 1})

        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {name: bits(total) for name, total in found.items()} == dict.fromkeys(NAMES, expected)


# -- what strangers send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"kind": "sum"}',
        b'{"kind": "mean", "shapes": []}',
        b'{"kind": "end", "shapes": [["x", []]]}',
        b'{"kind": "sum", "shapes": [["x", [-1]]]}',
        b'{"kind": "sum", "shapes": [["x", [1.5]]]}',
        b'{"kind": "sum", "shapes": [["x", [true]]]}',
        b'{"kind": "sum", "shapes": [["x", [99999999999]]]}',
        b'{"kind": "sum", "shapes": [["x", []], ["x", []]]}',
        b'{"kind": "sum", "shapes": [["\\u001b[2J", []]]}',
        b'{"kind": "sum", "shapes": {"x": []}}',
    ],
)
def test_a_malformed_call_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        Call.from_array(np.frombuffer(text, np.uint8))


def test_malformed_texts_are_refused() -> None:
    assert read_texts(pack_texts(["b", "a", "b"])) == ["a", "b"]
    for wrong in ({"a": 1}, ["a", 1], ["a" * 1001], [""] * (MAX_TEXTS + 1)):
        with pytest.raises(ProtocolError):
            read_texts(packed(wrong))


def test_an_update_that_does_not_fit_its_call_is_refused() -> None:
    def work(place: Place) -> None:
        with fl.sums(kit=place.kit) as federation:
            if place.index == 1:
                federation._exchange(Call("sum", (("x", (3,)),)), np.zeros(2), {})
            federation.sum({"x": np.zeros(3)})

    with LocalFederation(sites=3, min_sites=2) as federation:
        outcomes = federation.outcomes(dict.fromkeys(NAMES, work), check=False)
        federation.result()
    assert isinstance(outcomes["site-2"].error, UpdateRefusedError | FederationError)
    assert outcomes["site-1"].error is None is outcomes["site-3"].error


# -- what people see -------------------------------------------------------------------------------------------------


def test_a_simulation_of_a_function_with_sums_and_what_it_shows(tmp_path: Path) -> None:
    """Several processes over gRPC. The screen and the lines speak of sums, without losses or a number of rounds."""
    told, view, shown = StringIO(), RunView(), []
    lines = ProgressLines(told)

    def listen(event: Event) -> None:
        view(event)
        lines(event)
        if event.kind == "round_finished":
            console = Console(width=100, file=StringIO(), record=True)
            console.print(run_screen(view, 100))
            shown.append(console.export_text())

    simulation = fl.Simulation(sites=3, script=mean_of_sites, folder=tmp_path, listeners=(listen,), quiet=True)
    result = fl.Job(app="mean", name="sums", rounds=5).run(simulation)
    assert [len(training.rounds) for training in result.trainings] == [3, 2] and result.model is None
    assert "sums with 3 sites" in told.getvalue() and "sum 2: 3 sites, up " in told.getvalue()
    assert "no metrics" not in told.getvalue() and "best round" not in told.getvalue()
    assert "sums  sum 2" in shown[1] and "loss" not in shown[1] and "%" in shown[1]
    report = (result.folder / "report.html").read_text("utf-8")
    assert "Finished." in report and "loss" not in re.sub(r"<style.*?</style>", "", report, flags=re.S)
    for name in NAMES:
        assert "mean 1.0 of c0 c1 c2" in (result.folder / "sites" / name / "log.txt").read_text("utf-8")


def mean_of_sites() -> None:
    """The script of the simulation: it travels by its source."""
    import fl_adapters

    index = fl_adapters.site().index
    with fl_adapters.sums(agree={"what": "mean"}) as federation:
        total = federation.sum({"x": index, "n": 1})
        names = federation.union([f"c{index}"])
    with fl_adapters.sums() as federation:
        assert federation.sum({"x": index})["x"] == total["x"]
    print(f"mean {total['x'] / total['n']} of {' '.join(names)}")
