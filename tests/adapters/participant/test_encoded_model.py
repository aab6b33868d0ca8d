"""Quantised global models (`Quantize` at `server_out`): training is not lost, and restarts end with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.client import SiteClient
from fl_runtime.errors import ProtocolError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.feedback import HELD_VERSION
from fl_runtime.filters.site import SiteFilters
from fl_runtime.server import Server
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Array, Arrays, RunSettings, Settings, Task, Update
from fl_runtime.wire.manifest import Manifest

INT8, INT4 = {"name": "Quantize", "to": "int8"}, {"name": "Quantize", "to": "int4"}
DOWN8, DOWN4 = {**INT8, "at": "server_out"}, {**INT4, "at": "server_out"}

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
TEST = np.arange(len(X)) % 4 == 0
SITES, ROUNDS = 3, 30


def initial() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "in.weight": rng.normal(size=(64, 32), scale=0.2).astype(np.float32),
        "in.bias": np.zeros(32, np.float32),
        "out.weight": rng.normal(size=(32, 10), scale=0.2).astype(np.float32),
        "out.bias": np.zeros(10, np.float32),
        "steps": np.zeros((), np.int64),
    }


def forward(w: Arrays, x: Array) -> tuple[Array, Array]:
    hidden = np.tanh(x @ w["in.weight"] + w["in.bias"])
    logits = hidden @ w["out.weight"] + w["out.bias"]
    e = np.exp(logits - logits.max(1, keepdims=True))
    return hidden, e / e.sum(1, keepdims=True)


def train(w: Arrays, index: int, rate: float = 0.02) -> dict[str, Array]:
    """An epoch of SGD on this site's digits, in NumPy; a round moves the weights by little."""
    w = {name: np.array(array) for name, array in w.items()}
    rows = np.flatnonzero(~TEST)[index::SITES]
    for batch in np.array_split(rows, 30):
        hidden, p = forward(w, X[batch])
        p[np.arange(len(batch)), Y[batch]] -= 1
        p /= np.float32(len(batch))
        inner = (p @ w["out.weight"].T) * (1 - hidden**2)
        for name, gradient in (
            ("out.weight", hidden.T @ p),
            ("out.bias", p.sum(0)),
            ("in.weight", X[batch].T @ inner),
            ("in.bias", inner.sum(0)),
        ):
            w[name] -= np.float32(rate) * gradient
        w["steps"] += 1
    return w


def accuracy(w: Arrays) -> float:
    return float((forward(w, X[TEST])[1].argmax(1) == Y[TEST]).mean())


def digits(*filters: Settings, rounds: int = ROUNDS, **job: Any) -> tuple[Arrays, Any]:
    """Train on the digits of three sites; return the final model and the run's result."""

    def work(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=initial()):
                task.submit(train(task.arrays, place.index), num_examples=1, local_steps=30)
            return site.arrays

    with LocalFederation(sites=SITES, rounds=rounds, filters=filters, **job) as federation:
        return federation.run(work)["site-1"], federation.result()


@pytest.fixture(scope="module")
def unfiltered() -> float:
    reached = accuracy(digits()[0])
    assert 0.8 < reached < 0.95  # still learning, so that what is lost would show
    return reached


@pytest.mark.parametrize(
    ("filters", "points"),
    [
        ([DOWN8], 0.01),
        ([DOWN4], 0.01),
        ([INT8, DOWN8], 0.01),
        ([INT4, DOWN4], 0.02),
        ([INT4, DOWN8], 0.02),
        ([{**INT8, "to": "bf16", "at": "server_out"}], 0.01),
    ],
    ids=["int8 down", "int4 down", "int8", "int4", "int4 up, int8 down", "bf16 down"],
)
def test_training_reaches_the_accuracy_of_models_that_travel_whole(
    filters: list[Settings], points: float, unfiltered: float
) -> None:
    assert accuracy(digits(*filters)[0]) == pytest.approx(unfiltered, abs=points)


def test_a_difference_takes_a_quarter_of_the_bytes_from_round_2_on() -> None:
    whole, packed = (digits(*filters, rounds=3)[1].rounds for filters in ([], [DOWN8]))
    assert packed[0].bytes_down == pytest.approx(whole[0].bytes_down, rel=0.02)
    assert all(packed[number].bytes_down < 0.45 * whole[number].bytes_down for number in (1, 2))


def rounded(x: Array, levels: int, block: int = 256) -> Array:
    """Quantise and decode by the formula of `Quantize`, in plain NumPy."""
    flat, out = x.reshape(-1).astype(np.float32), []
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        scale = np.float32(np.abs(part).max() / np.float32(levels))
        out.append(np.clip(np.rint(part / scale), -levels, levels).astype(np.float32) * scale if scale else part * 0)
    return np.concatenate(out).reshape(x.shape)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavg:weights=equal", "fedavgm:momentum=0.5", "median", "fednova"])
@pytest.mark.parametrize("levels", [127, 7])
def test_rounds_against_numpy(strategy: str, levels: int) -> None:
    """The sites train from h, and the server applies their changes to its exact x."""
    rounds = 5
    found, _ = digits(DOWN8 if levels == 127 else DOWN4, rounds=rounds, strategy=strategy)
    x = {name: array.astype(np.float64) for name, array in initial().items() if name != "steps"}
    h = {name: array.copy() for name, array in initial().items()}
    momentum = {name: np.zeros_like(array) for name, array in x.items()}
    for number in range(rounds):
        if number:
            for name in x:
                h[name] = h[name] + rounded(x[name].astype(np.float32) - h[name], levels)
            h["steps"] = np.asarray(30 * number)
        trained = [train(h, index) for index in range(SITES)]
        for name in x:
            changes = [site[name].astype(np.float64) - h[name] for site in trained]
            change = np.median(changes, axis=0) if strategy == "median" else np.mean(changes, axis=0)
            if strategy.startswith("fedavgm"):
                change = momentum[name] = 0.5 * momentum[name] + change
            x[name] = x[name] + change
    for name in x:
        np.testing.assert_allclose(found[name], x[name], atol=2e-5)
    assert found["steps"] == 30 * rounds


def test_a_model_that_does_not_change_keeps_its_bits() -> None:
    frozen = {"w": np.random.default_rng(0).normal(size=900).astype(np.float32), "h": np.ones(5, np.float16) / 3}

    def work(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=frozen):
                assert all(task.arrays[name].tobytes() == array.tobytes() for name, array in frozen.items())
                task.submit(task.arrays, num_examples=1)
            return site.arrays

    with LocalFederation(sites=2, rounds=4, filters=(DOWN4,)) as federation:
        finals = federation.run(work)
    assert all(finals["site-2"][name].tobytes() == array.tobytes() for name, array in frozen.items())


@pytest.mark.parametrize("filters", [(DOWN4,), (INT4, DOWN4)], ids=["down", "both"])
def test_sites_that_sit_out_rounds_hold_the_same_model(filters: tuple[Settings, ...]) -> None:
    """With a fraction, a site's last model is often older than the one that a difference is added to."""
    seen: dict[int, set[bytes]] = {}

    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=initial()):
                seen.setdefault(task.round, set()).add(b"".join(a.tobytes() for a in task.arrays.values()))
                task.submit(train(task.arrays, place.index % SITES), num_examples=1)

    with LocalFederation(sites=4, rounds=8, fraction=0.5, min_sites=2, filters=filters) as federation:
        federation.run(work)
        federation.result()
    assert len(seen) == 8 and all(len(models) == 1 for models in seen.values())


def test_cross_site_evaluation_scores_the_sites_own_models() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(3)}, evaluate=lambda arrays: ({"loss": arrays["w"][0]}, 1)):
                task.submit({"w": np.full(3, 10.0 * task.round + place.index)}, num_examples=1)

    with LocalFederation(sites=2, rounds=3, cross_site=True, filters=(DOWN8,)) as federation:
        federation.run(work)
        federation.result()
        (event,) = [event for event in federation.events if event.kind == "cross_site"]
    assert {name: row["site-1"]["loss"] for name, row in event.data["matrix"].items() if name != "global"} == {
        "site-1": 30.0,
        "site-2": 31.0,
    }


# -- restarts ------------------------------------------------------------------------------------------------


class Peer:
    """One process of a site, driven call by call."""

    def __init__(self, server: Server, name: str, filters: tuple[Settings, ...], folder: Path) -> None:
        self.name, self.client = name, SiteClient(MemoryTransport(server.service, name), 30.0)
        self.filters = SiteFilters(filters, (), FilterHost(name, "test", folder))
        self.attempt = self.client.join().attempt
        self.task: Task | None = None

    def register(self) -> None:
        self.filters.agree(initial())
        self.client.register(
            Manifest.of(initial()), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False
        )

    def receive(self) -> Task:
        task = self.client.next_task()
        if task.kind == "initial":
            self.client.submit(self.update(task, initial()))
            task = self.client.next_task()
        self.differs = HELD_VERSION in task.config
        self.task = self.filters.received(task)
        return self.task

    def update(self, task: Task, arrays: Arrays) -> Update:
        return Update("test", task.round, "", self.name, self.attempt, task.version, arrays, 3)

    def answer(self) -> None:
        assert self.task is not None
        trained = train(self.task.arrays, int(self.name[-1]) - 1)
        self.client.submit(self.filters.outgoing(self.update(self.task, trained), self.task))


def registered(server: Server, filters: tuple[Settings, ...], folder: Path, *names: str) -> dict[str, Peer]:
    peers = {name: Peer(server, name, filters, folder / name) for name in names}
    threads = [threading.Thread(target=peer.register) for peer in peers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return peers


def final_bits(folder: Path, strategy: str, filters: tuple[Settings, ...], die: str = "", at: int = 0) -> bytes:
    """Run four rounds; in round `at`, when one site has answered, the server or the other site is killed."""
    names = ("site-1", "site-2")
    run = RunSettings("test", names, 2, rounds=4, strategy=strategy, filters=filters)
    server = Server(run, folder, dict.fromkeys(names, "x"))
    server.begin()
    peers = registered(server, filters, folder, *names)
    while (tasks := [peer.receive() for peer in peers.values()])[0].kind == "train":
        number = tasks[0].round
        if not die:
            assert all(peer.differs == (number > 1) for peer in peers.values())
        peers["site-2"].answer()
        if number == at and die == "server":
            server._lock.close()  # as the end of its process does
            server = Server(run, folder, {})
            server.begin()
            for name in names:
                held = peers[name].client._held  # the site's process lives on
                peers[name].client = SiteClient(MemoryTransport(server.service, name), 30.0)
                peers[name].client._held = held
                peers[name].attempt = peers[name].client.join().attempt
            threads = [threading.Thread(target=peer.register) for peer in peers.values()]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peers["site-1"].receive()
        if number == at and die == "site":
            peers |= registered(server, filters, folder, "site-1")
            peers["site-1"].receive()
            assert not peers["site-1"].differs  # a new process holds nothing: it gets the same model, whole
        peers["site-1"].answer()
    server.close()
    return b"".join(array.tobytes() for array in tasks[0].arrays.values())


@pytest.mark.parametrize("filters", [(DOWN4,), (INT8, DOWN8)], ids=["int4 down", "int8"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam:lr=0.05"])
def test_a_run_that_was_killed_ends_with_the_same_bits(
    tmp_path: Path, filters: tuple[Settings, ...], strategy: str
) -> None:
    undisturbed = final_bits(tmp_path / "undisturbed", strategy, filters)
    for die in ("server", "site"):
        for at in (1, 3):
            assert final_bits(tmp_path / f"{die}-{at}", strategy, filters, die, at) == undisturbed, (die, at)


def test_a_difference_to_another_model_is_refused() -> None:
    site = SiteFilters((DOWN8,), (), FilterHost())
    site.agree(initial())
    site.received(Task("test", 1, "", "train", 0, initial()))
    with pytest.raises(ProtocolError, match="a difference to model 1, but this site holds model 0"):
        site.received(Task("test", 3, "", "train", 2, {}, config={HELD_VERSION: 1}))
