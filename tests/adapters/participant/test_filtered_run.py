"""Filters in a whole federation: at all four points, over sockets, in any order of arrival, and against lying sites."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.client import SiteClient
from fl_runtime.errors import FederationError, ProtocolError, StateMismatchError, UpdateRefusedError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.site import SiteFilters
from fl_runtime.server import Server
from fl_runtime.server.records.history import History
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Array, Arrays, RunSettings, Settings, Task, Update
from fl_runtime.wire.manifest import Manifest


def initial() -> dict[str, Array]:
    return {
        "w": np.zeros((40, 50), np.float32),
        "head.b": np.zeros(11, np.float64),
        "steps": np.zeros((), np.int64),
    }


def step(arrays: Arrays, index: int) -> dict[str, Array]:
    rng = np.random.default_rng(index)
    moved = {n: a + rng.normal(size=a.shape).astype(a.dtype) for n, a in arrays.items() if n != "steps"}
    return {**moved, "steps": np.asarray(arrays["steps"] + 1)}


def loop(place: Place) -> Arrays:
    """A training script whose weights change by the same difference in every round."""
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=initial()):
            task.submit(step(task.arrays, place.index), num_examples=10 * (place.index + 1), metrics={"loss": 0.125})
        return site.arrays


def mean(difference: Callable[[Array], Array] = np.asarray) -> dict[str, Array]:
    """Compute one round by hand: the mean of the differences, weighted 10 to 20."""
    parts = [step(initial(), 0), step(initial(), 1)]
    found = {n: (10 * difference(parts[0][n]) + 20 * difference(parts[1][n])) / 30 for n in ("w", "head.b")}
    return {**found, "steps": np.array(1)}


RUNS: dict[str, tuple[list[dict[str, Any]], dict[str, Array], float]] = {
    "int8": ([{"name": "Quantize"}], mean(), 0.02),
    "int4": ([{"name": "Quantize", "to": "int4", "block": 16}], mean(), 0.3),
    "fp16": ([{"name": "Quantize", "to": "fp16"}], mean(), 2e-3),
    "top": ([{"name": "TopK", "ratio": 1.0, "small": 0}], mean(), 1e-6),
    "limited": (
        [{"name": "PercentilePrivacy", "percentile": 0, "gamma": 0.5}],
        mean(lambda d: np.clip(d, -0.5, 0.5)),
        1e-6,
    ),
    "limited at the server": (
        [{"name": "PercentilePrivacy", "percentile": 0, "gamma": 0.5, "at": "server_in"}],
        mean(lambda d: np.clip(d, -0.5, 0.5)),
        1e-6,
    ),
    "excluded": (
        [{"name": "ExcludeVars", "names": ["head.*"]}],
        {**mean(), "head.b": np.zeros(11)},
        1e-6,
    ),
    "down": ([{"name": "Quantize", "to": "bf16", "at": "server_out"}], mean(), 1e-6),
}


@pytest.mark.parametrize("name", RUNS)
def test_one_round_against_numpy(name: str) -> None:
    filters, wanted, close = RUNS[name]
    with LocalFederation(sites=2, rounds=1, sockets=name in ("int8", "down"), filters=tuple(filters)) as federation:
        finals = federation.run(loop)
        federation.result()
    for final in finals.values():
        for tensor, array in wanted.items():
            np.testing.assert_allclose(final[tensor], array, atol=close)
            assert final[tensor].dtype == initial()[tensor].dtype
    assert all(finals["site-1"][n].tobytes() == finals["site-2"][n].tobytes() for n in wanted)


def test_equal_weights_and_the_history_of_what_ran(tmp_path: Path) -> None:
    job = ({"name": "Examples", "equal": True}, {"name": "AllowMetrics"}, {"name": "Quantize", "to": "fp16"})
    with LocalFederation(sites=2, rounds=2, filters=job, folder=tmp_path) as federation:
        finals = federation.run(loop)
        federation.result()
        events = federation.events
    parts = [step(initial(), 0), step(initial(), 1)]
    np.testing.assert_allclose(finals["site-1"]["w"], parts[0]["w"] + parts[1]["w"], atol=0.01)
    for event in events:
        if event.kind == "update":
            assert [f["name"] for f in event.data["filters"]] == ["Examples", "AllowMetrics", "Quantize"]
            assert (event.data["metrics"], event.data["num_examples"]) == ({}, 1)
    (started,) = [e for e in events if e.kind == "started"]
    assert started.data["filters"] == list(job)
    said = {e.site: e.data["info"]["filters"] for e in events if e.kind == "registered"}
    assert said["site-2"].startswith("Examples(equal=True), AllowMetrics()")

    history = History(tmp_path / "history")
    for event in events:
        history(event)
    history.close()
    with open(tmp_path / "history" / "history.csv", encoding="utf-8") as file:
        rows = {(r["round"], r["site"]): r["filters"] for r in csv.DictReader(file)}
    assert rows["1", "site-2"] == "Examples > AllowMetrics > Quantize"


def test_fewer_bytes_travel_and_the_last_model_travels_whole() -> None:
    def run(*filters: Settings) -> tuple[int, int]:
        with LocalFederation(sites=2, rounds=3, filters=filters) as federation:
            finals = federation.run(loop)
            result = federation.result()
            whole = federation.model()
        assert all(final[n].tobytes() == a.tobytes() for final in finals.values() for n, a in whole.items())
        return result.rounds[1].bytes_up, result.rounds[1].bytes_down

    up, down = run()
    packed_up, packed_down = run(
        {"name": "TopK", "ratio": 0.05, "small": 0},
        {"name": "Quantize", "to": "int8"},
        {"name": "Quantize", "to": "int8", "at": "server_out"},
    )
    assert packed_up < up / 8 and packed_down < down / 3


def test_a_model_that_does_not_change_stays_as_it_is_through_every_encoding() -> None:
    """Frozen bfloat16 and float16 models must not drift."""
    rng = np.random.default_rng(0)
    frozen = {n: rng.normal(size=300).astype(d) for n, d in (("h", np.float16), ("w", np.float32))}

    def still(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=frozen):
                task.submit(task.arrays, num_examples=place.index + 1)
            return site.arrays

    for filters in ([{"name": "Quantize", "to": "int4"}], [{"name": "TopK", "small": 0}]):
        with LocalFederation(sites=2, rounds=4, filters=tuple(filters)) as federation:
            finals = federation.run(still)
        assert all(finals["site-2"][n].tobytes() == a.tobytes() for n, a in frozen.items())


# -- the server, one call at a time --------------------------------------------------------------------------


class Peer:
    """One site, driven call by call."""

    def __init__(self, server: Server, name: str, filters: tuple[Settings, ...]) -> None:
        self.name, self.client = name, SiteClient(MemoryTransport(server.service, name), 30.0)
        self.filters = SiteFilters(filters, (), FilterHost())
        self.attempt = self.client.join().attempt

    def register(self) -> None:
        self.filters.agree(initial())
        self.client.register(
            Manifest.of(initial()), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False
        )

    def begin(self) -> Task:
        task = self.client.next_task()
        if task.kind == "initial":
            self.client.submit(self.update(task, initial()))
            task = self.client.next_task()
        self.task = self.filters.received(task)
        return self.task

    def update(self, task: Task, arrays: Arrays, **fields: Any) -> Update:
        return Update("test", task.round, "", self.name, self.attempt, task.version, arrays, 3, **fields)

    def leaving(self) -> Update:
        trained = step(self.task.arrays, int(self.name[-1]))
        return self.filters.outgoing(self.update(self.task, trained), self.task)


def started(tmp_path: Path, filters: tuple[Settings, ...], sites: int = 3) -> tuple[Server, dict[str, Peer]]:
    import threading

    names = tuple(f"site-{n}" for n in range(1, sites + 1))
    server = Server(RunSettings("test", names, sites, rounds=1, filters=filters), tmp_path, dict.fromkeys(names, "x"))
    server.begin()
    peers = {name: Peer(server, name, filters) for name in names}
    threads = [threading.Thread(target=peer.register) for peer in peers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for peer in peers.values():
        peer.begin()
    return server, peers


@pytest.mark.parametrize(
    "filters",
    [({"name": "Quantize"},), ({"name": "TopK", "ratio": 0.1}, {"name": "Quantize", "to": "int4"})],
    ids=["int8", "top"],
)
def test_orders_of_arrival_give_the_same_bits(tmp_path: Path, filters: tuple[Settings, ...]) -> None:
    def result(order: tuple[str, ...]) -> bytes:
        server, peers = started(tmp_path / "".join(order), filters)
        for name in order:
            assert peers[name].client.submit(peers[name].leaving()) == "used"
        final = peers["site-1"].client.next_task().arrays
        server.abort("done")
        server.close()
        return b"".join(a.tobytes() for a in final.values())

    orders = itertools.permutations(("site-1", "site-2", "site-3"))
    assert len({result(order) for order in itertools.islice(orders, 0, None, 2)}) == 1


def test_a_server_that_is_killed_goes_on_with_what_was_encoded(tmp_path: Path) -> None:
    filters = ({"name": "Quantize", "to": "int4"}, {"name": "Quantize", "to": "bf16", "at": "server_out"})

    def result(folder: Path, *, killed: bool) -> bytes:
        server, peers = started(folder, filters, sites=2)
        peers["site-2"].client.submit(peers["site-2"].leaving())
        if killed:
            server._lock.close()  # as the end of its process does
            server = Server(server.trainings.newest.run.state.settings, folder, {})
            server.begin()
            peers = {name: Peer(server, name, filters) for name in peers}
            for peer in peers.values():
                peer.register()
            peers["site-1"].begin()
        peers["site-1"].client.submit(peers["site-1"].leaving())
        final = peers["site-1"].client.next_task()
        assert final.kind == "final"
        server.close()
        return b"".join(a.tobytes() for a in final.arrays.values())

    assert result(tmp_path / "a", killed=True) == result(tmp_path / "b", killed=False)


def lies() -> dict[str, tuple[Callable[[Update], Update], type[FederationError]]]:
    def said(*filters: Settings, **more: Any) -> Callable[[Update], Update]:
        return lambda u: replace(u, encoding=json.dumps(filters), **more)

    def changed(name: str, make: Callable[[Array], Array]) -> Callable[[Update], Update]:
        return lambda u: replace(u, arrays={**u.arrays, name: make(np.array(u.arrays[name]))})

    scales = "w|scale"
    return {
        "another filter": (said({"name": "TopK"}), StateMismatchError),
        "another argument": (said({"name": "Quantize", "to": "int4"}), StateMismatchError),
        "no filter": (said(), UpdateRefusedError),
        "an unknown argument": (said({"name": "Quantize", "bits": 3}), ProtocolError),
        "too many": (said(*[{"name": "Quantize"}] * 9), ProtocolError),
        "far too many": (said(*[{"name": "x"}] * 50), ProtocolError),
        "not JSON": (lambda u: replace(u, encoding="[" * 5000), ProtocolError),
        "not a list of tables": (lambda u: replace(u, encoding="[1]"), ProtocolError),
        "plain content": (lambda u: replace(u, content="weights"), ProtocolError),
        "a delta": (lambda u: replace(u, content="delta", encoding=""), StateMismatchError),
        "foreign": (lambda u: replace(u, encoding="trees"), UpdateRefusedError),
        "a name too many": (lambda u: replace(u, arrays={**u.arrays, "x": np.zeros(3, np.int8)}), StateMismatchError),
        "a scale that is not finite": (changed(scales, lambda a: np.full_like(a, np.inf)), UpdateRefusedError),
        "a negative scale": (changed(scales, lambda a: -a), UpdateRefusedError),
        "numbers that overflow": (changed(scales, lambda a: np.full_like(a, 3e38)), UpdateRefusedError),
    }


@pytest.mark.parametrize("lie", lies())
def test_encodings_that_lie_are_refused_and_the_run_goes_on(tmp_path: Path, lie: str) -> None:
    server, peers = started(tmp_path, ({"name": "Quantize"},), sites=1)
    change, error = lies()[lie]
    honest = peers["site-1"].leaving()
    with pytest.raises(error):
        peers["site-1"].client.submit(change(honest))
    assert peers["site-1"].client.submit(honest) == "used"
    assert peers["site-1"].client.next_task().kind == "final"
    server.close()


# -- a budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("central", [False, True], ids=["site", "server"])
def test_a_run_whose_budget_was_spent_by_an_earlier_one_stops_before_round_1_and_says_so_at_both_ends(
    tmp_path: Path, central: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dp_accounting")
    from fl_adapters.cli.privacy import ledger as privacy
    from fl_runtime.filters.ledger import LEDGER_FILE, Ledger, Mechanism, epsilon

    after = epsilon([Mechanism("gaussian", 2.0)] * 3, 1e-5)
    dp = {"name": "GaussianDP", "noise_multiplier": 4.0, "clip": 0.1, "epsilon": after * 1.1}
    dp |= {"at": "server_in"} if central else {}

    with LocalFederation(sites=2, rounds=3, filters=(dp,), folder=tmp_path) as federation:
        sent = federation.run(loop)
        kept = federation.model()
    assert np.abs(kept["w"]).max() > 0 and set(sent) == {"site-1", "site-2"}
    assert privacy.run(tmp_path, 1e-5, as_json=True) == 0
    ledgers = json.loads(capsys.readouterr().out)["ledgers"]
    assert len(ledgers) == (1 if central else 2)
    for ledger in ledgers:
        (job,) = ledger["jobs"]
        assert job == {"job": "test", "protects": "update", "rounds": 3, "epsilon": pytest.approx(after, rel=0.01)}
        assert [e["filter"] for e in ledger["entries"]] == ["GaussianDP"] * 3
    assert privacy.run(tmp_path, 1e-5, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "epsilon at delta 1e-05" in shown and "a site's whole update of a round" in shown

    again = tmp_path / "again"
    with LocalFederation(sites=2, rounds=1, filters=(dp,), folder=again) as federation:
        homes = [again / "server"] if central else [Path(place.kit) for place in federation.places]
        for home in homes:
            Ledger(home).spend("test", 3, "GaussianDP", [Mechanism("gaussian", 2.0)] * 3, [])
            assert (home / LEDGER_FILE).exists()
        outcomes = federation.outcomes({"site-1": loop, "site-2": loop}, check=False)
        with pytest.raises(FederationError) as of_the_run:
            federation.result()
        assert federation.server.result().rounds == ()
    said = f"the privacy budget of {'the server' if central else 'site-'}"
    errors = [outcome.error for outcome in outcomes.values()]
    assert said in str(of_the_run.value)
    assert all(isinstance(error, FederationError) and said in str(error) for error in errors)
    assert any(isinstance(error, fl.PrivacyBudgetError) for error in errors)


@pytest.mark.parametrize("central", [False, True], ids=["site", "server"])
def test_a_budget_alone_lasts_for_all_rounds(tmp_path: Path, central: bool) -> None:
    pytest.importorskip("dp_accounting")
    from fl_runtime.filters.ledger import LEDGER_FILE, Ledger

    dp = {"name": "GaussianDP", "clip": 0.1, "epsilon": 8, **({"at": "server_in"} if central else {})}
    with LocalFederation(sites=3, rounds=6, fraction=0.6, seed=3, filters=(dp,), folder=tmp_path) as federation:
        federation.run(loop)
        assert len(federation.server.result().rounds) == 6
        spent = [Ledger(path.parent).spent("test", 1e-5) for path in tmp_path.rglob(LEDGER_FILE)]
    assert len(spent) == (1 if central else 3)
    assert max(spent) == pytest.approx(8, rel=1e-3) and max(spent) <= 8


@pytest.mark.parametrize("central", [False, True], ids=["site", "server"])
@pytest.mark.parametrize("said", [False, True], ids=["unsaid", "said"])
def test_all_trainings_of_a_script_share_one_ledger_and_its_budget(tmp_path: Path, central: bool, said: bool) -> None:
    pytest.importorskip("dp_accounting")
    from fl_runtime.filters.ledger import LEDGER_FILE, Ledger

    dp = {"name": "GaussianDP", "clip": 0.1, "epsilon": 8, **({"at": "server_in"} if central else {})}

    def twice(place: Place) -> None:
        loop(place)
        loop(place)

    settings: dict[str, Any] = {"trainings": 2} if said else {}
    with LocalFederation(sites=2, rounds=3, filters=(dp,), folder=tmp_path, **settings) as federation:
        outcomes = federation.outcomes({"site-1": twice, "site-2": twice}, check=False)
        ledgers = [Ledger(path.parent) for path in tmp_path.rglob(LEDGER_FILE)]
        spent = [ledger.spent("test", 1e-5) for ledger in ledgers]
    errors = [outcome.error for outcome in outcomes.values()]
    assert len(spent) == (1 if central else 2)
    assert spent == pytest.approx([8] * len(spent), rel=1e-3) and max(spent) <= 8
    if said:
        assert errors == [None, None]
        assert {entry.job for entry in ledgers[0].entries()} == {"test", "test/2"}
    else:
        assert all(error is not None and "privacy budget" in str(error) for error in errors)


def test_the_ledger_of_nothing_is_an_error_that_says_where_to_look(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "fl_adapters", "privacy", str(tmp_path)], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "there is no privacy ledger in this folder" in done.stderr
        and str(tmp_path) in done.stderr
    )


@pytest.mark.parametrize("strategy", ["median", "fedadam:lr=0.5", "trimmed-mean:trim=0.34", "fedavgm:momentum=0.5"])
@pytest.mark.parametrize(
    "filters",
    [
        ({"name": "PercentilePrivacy", "percentile": 0, "gamma": 0.5, "at": "server_in"},),
        ({"name": "ExcludeVars", "names": ["head.*"]},),
        ({"name": "Quantize", "to": "fp16"},),
    ],
    ids=["limited at the server", "held back", "half"],
)
def test_strategies_see_every_update_as_the_filters_leave_it(strategy: str, filters: tuple[Settings, ...]) -> None:
    """The result equals that of sites which apply the filter's effect by themselves."""

    def run(filters: tuple[Settings, ...], by_hand: Callable[[str, Array], Array] | None = None) -> Arrays:
        def work(place: Place) -> Arrays:
            with fl.connect(kit=place.kit) as site:
                for task in site.tasks(initial=initial()):
                    base = {n: a.copy() for n, a in task.arrays.items()}
                    new = step(base, place.index)
                    if by_hand is not None:
                        new = {
                            n: base[n] + by_hand(n, a - base[n]) if a.dtype.kind == "f" else a for n, a in new.items()
                        }
                    task.submit(new, num_examples=10)
                return {n: a.copy() for n, a in site.arrays.items()}

        with LocalFederation(sites=3, rounds=2, filters=filters, strategy=strategy) as federation:
            return federation.run(work)["site-1"]

    def effect(name: str, difference: Array) -> Array:
        match filters[0]["name"]:
            case "PercentilePrivacy":
                return np.clip(difference, -0.5, 0.5)
            case "ExcludeVars" if name.startswith("head."):
                return np.zeros_like(difference)
        return difference

    found, wanted = run(filters), run((), effect)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=0.02 if "Quantize" in str(filters) else 1e-5)


def test_a_run_without_rounds_reads_what_the_filters_have_made() -> None:
    filters = ({"name": "ExcludeVars", "names": ["head.*"]}, {"name": "Quantize", "to": "fp16"})
    with LocalFederation(sites=1, rounds=3, filters=filters, strategy="fedbuff:k=1,staleness=0") as federation:
        final = federation.run(loop)["site-1"]
    np.testing.assert_allclose(final["w"], 3 * step(initial(), 0)["w"], atol=0.02)
    np.testing.assert_array_equal(final["head.b"], initial()["head.b"])
    with pytest.raises(fl.ConfigError, match="works on rounds, which FedBuff does not have"):
        fl.Job(app="train.py", strategy="fedbuff", filters=({"name": "Quantize", "at": "server_out"},))
