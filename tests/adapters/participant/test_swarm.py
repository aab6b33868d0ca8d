"""Swarm rounds: the sites take turns to aggregate; the bits are FedAvg's, and the server sees no update."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.protocols.swarm import SwarmSite
from fl_adapters.participant.registry import close_sessions, open_session
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.aggregation import Swarm
from fl_runtime.aggregation.swarm import in_turn
from fl_runtime.errors import ConfigError, ProtocolError, QuorumError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays, Task, Update

EXAMPLES = (3, 1, 2, 5)
ROUNDS = 5


def initial(index: int) -> dict[str, Any]:
    draw = np.random.default_rng(index)
    return {
        "w": draw.normal(size=(300, 700)).astype(np.float32),  # larger than a message of a stream
        "half": draw.normal(size=7).astype(np.float16),
        "n": np.array(3),
        "empty": np.zeros((0, 2)),
    }


def trained(arrays: Arrays, index: int, round: int) -> dict[str, Any]:
    noise = np.random.default_rng([index, round])
    return {
        name: (array + noise.normal(size=array.shape)).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.asarray(array + index)
        for name, array in arrays.items()
    }


def loop(place: Place, before: Callable[[int], None] = lambda round: None, **options: Any) -> Arrays:
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=initial(place.index)):
            before(task.round)
            arrays = trained(task.arrays, place.index, task.round)
            extras = {"exp_avg/w": arrays["w"] * 2} if options.get("extras") else None
            task.submit(
                arrays,
                num_examples=EXAMPLES[place.index],
                local_steps=task.round,
                metrics={"loss": place.index},
                extras=extras,
            )
            for array in arrays.values():
                array[...] = 99  # they were borrowed
        return site.arrays


def run(strategy: str, sockets: bool = False, extras: bool = False, **settings: Any) -> tuple[Arrays, LocalFederation]:
    fields = {"sites": 4, "rounds": ROUNDS, "seed": 5, **settings}
    with LocalFederation(strategy=strategy, sockets=sockets, **fields) as federation:
        finals = federation.run(lambda place: loop(place, extras=extras))
        federation.result()
        model = federation.model()
    for final in finals.values():
        assert same(final, model)
    return model, federation


def same(found: Arrays, wanted: Arrays) -> bool:
    return found.keys() == wanted.keys() and all(found[n].tobytes() == wanted[n].tobytes() for n in wanted)


def data_of(federation: LocalFederation, kind: str, *names: str) -> list[Any]:
    return [(e.round, e.site, *(e.data[name] for name in names)) for e in federation.events if e.kind == kind]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("", {}),
        ("", {"sockets": True}),
        ("weights=equal", {"site_weights": {"site-2": 2.5}}),
        ("", {"fraction": 0.5, "min_sites": 2}),
        ("", {"extras": True}),
    ],
)
def test_the_bits_of_fedavg(arguments: str, settings: dict[str, Any]) -> None:
    found, swarm = run(f"swarm:{arguments}" if arguments else "swarm", **settings)
    wanted, fedavg = run(f"fedavg:{arguments}" if arguments else "fedavg", **settings)
    assert same(found, wanted)
    named = ("num_examples", "local_steps", "metrics", "status")
    assert sorted(data_of(swarm, "update", *named), key=str) == sorted(data_of(fedavg, "update", *named), key=str)
    told = ("metrics", "sites", "missing")
    assert data_of(swarm, "round_finished", *told) == data_of(fedavg, "round_finished", *told)


def test_the_role_moves_and_the_server_holds_no_update() -> None:
    names = [f"site-{n}" for n in range(1, 5)]
    sent: list[bytes] = []

    def kept_by(folder: Path) -> bytes:
        found = b""
        for path in (folder / "server").rglob("*"):
            with suppress(FileNotFoundError, IsADirectoryError):  # the server renames its files
                found += path.read_bytes()
        return found

    with LocalFederation(sites=4, rounds=8, seed=3, strategy="swarm", sockets=True) as federation:

        def site(place: Place) -> None:
            with fl.connect(kit=place.kit) as joined:
                for task in joined.tasks(initial=initial(place.index)):
                    kept = kept_by(federation.folder)
                    assert not any(data in kept for data in list(sent))
                    arrays = trained(task.arrays, place.index, task.round)
                    sent.append(arrays["w"][0].tobytes())
                    task.submit(arrays, num_examples=1)

        federation.run(site)
        federation.result()
        kept = kept_by(federation.folder)
        assert len(sent) == 32 and not any(data in kept for data in sent)
        assert federation.model()["w"][0].tobytes() in kept
    turns = [site for _, site in data_of(federation, "aggregator")]
    assert turns == [in_turn(names, round, 3)[0] for round in range(1, 9)]
    assert sorted(turns[:4]) == sorted(turns[4:]) == names and turns[:4] == turns[4:]
    up = {(e.round, e.site): e.data["bytes_up"] for e in federation.events if e.kind == "update" and e.round}
    assert max(up.values()) < 1000  # of a model of 840 kB


def test_what_others_could_read_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that the server relays do not contain the weights, which are all the same here."""
    from fl_runtime.server.calls.relay import Relay

    passed: list[bytes] = []
    inner = Relay._pass_on

    def listening(self: Any, line: Any, part: Any) -> None:
        passed.append(part.data)
        inner(self, line, part)

    monkeypatch.setattr(Relay, "_pass_on", listening)
    pattern = np.full(4096, 1.2345678)

    def site(place: Place) -> None:
        with fl.connect(kit=place.kit) as joined:
            for task in joined.tasks(initial={"w": pattern}):
                task.submit({"w": pattern}, num_examples=1)

    with LocalFederation(sites=2, rounds=1, strategy="swarm") as federation:
        federation.run(site)
        federation.result()
    assert sum(map(len, passed)) > pattern.nbytes
    assert all(pattern[:2].tobytes() not in data for data in passed)


class DeathError(Exception):
    pass


def with_a_death(when: str, number: int, **settings: Any) -> tuple[dict[str, Any], LocalFederation, list[str]]:
    """Run a swarm in which the site `number` turns behind the aggregator dies in round 2.

    It dies in its training ("training"), as the aggregator ("aggregating"), or when it is to send its update
    ("sharing").

    Returns:
        The outcomes, the federation, and the names of the victim and of the sites that aggregated in round 2.
    """
    names = [f"site-{n}" for n in range(1, 5)]
    fields = {"sites": 4, "rounds": 4, "seed": 5, "min_sites": 3, "strategy": "swarm", **settings}
    victim = in_turn(names, 2, 5)[number]
    patch = pytest.MonkeyPatch()

    with LocalFederation(**fields) as federation:

        def dying(verb: str) -> None:
            inner = getattr(SwarmSite, verb)

            def die(self: Any, task: Any) -> None:
                if self._me == victim and task.round == 2:
                    self.close()
                    self._client.close()
                    federation.server.site_left(victim, "it was killed")
                    raise DeathError
                inner(self, task)

            patch.setattr(SwarmSite, verb, die)

        if when != "training":
            dying({"aggregating": "_aggregate", "sharing": "_share"}[when])

        def site(place: Place) -> Arrays:
            def before(round: int) -> None:
                if when == "training" and place.name == victim and round == 2:
                    raise DeathError

            return loop(place, before)

        try:
            outcomes = federation.outcomes({place.name: site for place in federation.places}, check=False)
        finally:
            patch.undo()
    aggregators = [s for r, s in data_of(federation, "aggregator") if r == 2]
    return outcomes, federation, [victim, *aggregators]


@pytest.mark.parametrize("when", ["training", "aggregating", "sharing"])
def test_a_death_is_survived(when: str) -> None:
    outcomes, federation, (victim, *aggregators) = with_a_death(when, 1 if when == "sharing" else 0)
    alive = {name: o for name, o in outcomes.items() if name != victim}
    assert all(outcome.error is None for outcome in alive.values()), alive
    rounds = {r.round: r for r in federation.server.result().rounds}
    assert [len(rounds[n].sites) for n in (1, 2, 3, 4)] == [4, 3, 3, 3]
    assert victim not in rounds[2].sites and victim in rounds[2].missing
    if when == "aggregating":
        assert aggregators[0] == victim and victim not in aggregators[1:] and len(aggregators) > 1
    x = {name: np.array(a) for name, a in initial(0).items()}
    with LocalFederation(
        sites=1, rounds=1
    ) as by_hand:  # FedAvg over whoever took part, by the strategy of another test
        by_hand.server.abort("only its clock is needed")
    for number in range(1, 5):
        taking_part = [int(name[-1]) - 1 for name in rounds[number].sites]
        parts = [trained(x, index, number) for index in taking_part]
        total = sum(EXAMPLES[index] for index in taking_part)
        for name in ("w", "half"):
            mean = sum(p[name].astype(float) * EXAMPLES[i] / total for p, i in zip(parts, taking_part, strict=True))
            x[name] = mean.astype(x[name].dtype)
        x["n"] = np.max([p["n"] for p in parts], axis=0)
    finals = [outcome.value for outcome in alive.values()]
    assert np.allclose(finals[0]["w"], x["w"], atol=1e-5) and finals[0]["n"] == x["n"]


def test_without_enough_sites_the_run_ends_with_the_reason() -> None:
    outcomes, _, (victim, *_) = with_a_death("aggregating", 0, min_sites=4)
    for name, outcome in outcomes.items():
        if name != victim:
            assert isinstance(outcome.error, QuorumError)
            assert "round 2" in str(outcome.error) and victim in str(outcome.error)


SERVER = """
import sys
from pathlib import Path
from fl_runtime.server import Server
from fl_runtime.types import RunSettings

names = ("site-1", "site-2", "site-3")
run = RunSettings("test", names, 3, rounds=4, seed=5, strategy="swarm")
server = Server(run, Path(sys.argv[1]), {name: name for name in names}, port=int(sys.argv[2]))
print(server.start(), flush=True)
server.wait()
error = server.result().error
server.export(Path(sys.argv[1]) / "model")
server.close()
sys.exit(str(error) if error else 0)
"""


class ServerProcess:
    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, str(self.folder), self.address.rpartition(":")[2]]
        path = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def killed_and_started_again(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.start()


@pytest.mark.parametrize("when", ["before the mean", "after the mean"])
def test_a_killed_server_goes_on_with_the_same_bits(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerProcess(tmp_path / "server")
    inner, killed = SwarmSite._aggregate, []

    def aggregate(self: SwarmSite, task: Task) -> None:
        first = task.round == 2 and not killed
        if first:
            killed.append(self._me)
        if first and when == "before the mean":
            server.killed_and_started_again()
        inner(self, task)
        if first and when == "after the mean":
            server.killed_and_started_again()

    monkeypatch.setattr(SwarmSite, "_aggregate", aggregate)

    def site(index: int) -> Arrays:
        name = f"site-{index + 1}"
        kit = Kit("test", name, index, 3, server.address, name)
        try:
            return loop(Place(name, index, 3, str(kit.save(tmp_path / name))))
        finally:
            close_sessions("its script ended before the last round", kit)

    try:
        with ThreadPoolExecutor(3) as pool:
            finals = [future.result(120) for future in [pool.submit(site, index) for index in range(3)]]
        assert server.process.wait(60) == 0 and len(killed) == 1
    finally:
        server.process.kill()
        server.process.communicate()
    model = read_tensors(tmp_path / "server" / "model" / "model.safetensors")
    wanted, _ = run("fedavg", sites=3, rounds=4)
    assert same(model, wanted) and all(same(final, wanted) for final in finals)


@pytest.mark.parametrize("closing", [False, True], ids=["while others train", "when all have trained"])
def test_a_site_that_comes_back_trains_the_round_again(closing: bool) -> None:
    """Its first update was lost with its process, even if it was the last one of the round."""
    dead, back = threading.Event(), threading.Event()

    def site(place: Place) -> Arrays:
        def before(round: int) -> None:
            if place.index != 1 and round == 2:
                assert (dead if closing else back).wait(60)
            elif round == 2:
                session = open_session(Options(kit=place.kit), framework="test")
                assert session is not None and session.attempt == 1
                session.submit(initial(1), LocalResult(1, 0, {}))  # of a process that dies now
                session.departure.detach()
                raise DeathError

        try:
            return loop(place, before)
        except DeathError:
            dead.set()
            if closing:
                current = federation.server.trainings.newest.run.state.open_round
                assert current is not None
                end = time.monotonic() + 60
                while not current.collected:
                    assert time.monotonic() < end
                    time.sleep(0.01)
            return loop(place, lambda round: back.set())

    with LocalFederation(sites=3, rounds=3, seed=5, strategy="swarm") as federation:
        federation.run(site)
        federation.result()
        model = federation.model()
    assert [e.data["attempt"] for e in federation.events if e.kind == "joined" and e.site == "site-2"] == [1, 2]
    wanted, _ = run("fedavg", sites=3, rounds=3)
    assert same(model, wanted)


def test_the_server_takes_no_update_and_no_strangers_mean() -> None:
    refused: list[str] = []

    def site(place: Place) -> None:
        session = open_session(Options(kit=place.kit), framework="test")
        assert session is not None
        session.register({"w": np.zeros(3)}, agreement={}, rounds=None, evaluates=False)
        task = session.start(lambda: {"w": np.zeros(3)})
        update = session._header.update(task, {"w": np.ones(3)}, LocalResult(1, 0, {}), {})
        for stage in ("", "swarm-1-0123456789abcdef"):
            try:
                refused.append(session._client.submit(replace(update, stage=stage)))
            except ProtocolError as error:
                refused.append(error.what)
        receipt = replace(update, arrays={}, content="encoded", encoding="swarm receipt")
        try:
            session._client.submit(replace(receipt, arrays={"w": np.ones(3)}))
        except ProtocolError as error:
            refused.append(error.what)
        session.leave("enough")

    with LocalFederation(sites=2, rounds=1, strategy="swarm") as federation:
        federation.outcomes({place.name: site for place in federation.places}, check=False)
    assert any("receipts" in what for what in refused) and "late" in refused
    assert any("a swarm receipt must not hold tensors" in what for what in refused)
    assert "used" not in refused


def test_what_a_policys_filter_has_changed_does_not_travel() -> None:
    site = SwarmSite(None, "north", None, Swarm(), 1.0, 1.0, None)  # type: ignore[arg-type]
    update = Update("test", 1, "", "north", 1, 0, {"w": np.ones(2)}, 1)
    for changed in (replace(update, content="delta"), replace(update, encoding='[{"name": "ExcludeVars"}]')):
        with pytest.raises(ConfigError, match="a filter of this site"):
            site.outgoing(changed)
    assert not site.outgoing(update).arrays


def test_sites_that_take_turns_cannot_wait_for_each_other() -> None:
    with pytest.raises(ConfigError, match="one at a time"):
        LocalFederation(sites=2, rounds=1, strategy="swarm", states=[])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sites": 1}, "2 sites"),
        ({"sites": 4, "min_sites": 1}, "2 sites"),
        ({"sites": 4, "fraction": 0.25}, "2 sites"),
        ({"sites": 3, "late": "carry"}, "late"),
        ({"sites": 3, "cross_site": True}, "cross_site"),
        ({"sites": 3, "filters": [{"name": "Quantize", "to": "int8"}]}, "Quantize"),
        ({"sites": 3, "filters": [{"name": "HomomorphicCKKS"}]}, "HomomorphicCKKS"),
    ],
)
def test_what_cannot_work_is_refused_when_the_job_is_made(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        fl.Job(app="train.py", rounds=2, strategy="swarm", **fields)
    fl.Job(app="train.py", rounds=2, strategy="swarm", sites=3, filters=[{"name": "RoundMetrics"}])


SCRIPT = """
import numpy as np, fl_adapters as fl
index = fl.site().index
with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(2)}):
        task.submit({"w": task.arrays["w"] + index}, num_examples=1)
"""


def test_a_simulation(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    job = fl.Job(app=str(tmp_path / "train.py"), name="swarmed", rounds=3, sites=3, strategy=fl.Swarm())
    result = job.run(fl.Simulation(folder=tmp_path, quiet=True))
    assert read_tensors(result.folder / "model" / "model.safetensors")["w"].tolist() == [3.0, 3.0]


def test_an_update_that_makes_the_mean_infinite_is_left_out_of_its_round() -> None:
    """No honest aggregator ends with the mean that it cannot send: it names the site whose update is the largest."""
    large = {1: 3.3e38, 3: -3e38}

    def site(place: Place) -> Arrays:
        with fl.connect(kit=place.kit) as joined:
            for task in joined.tasks(initial={"w": np.zeros(3, np.float32)}):
                honest = task.arrays["w"] + np.float32(1 + place.index)
                value = np.full(3, large[place.index], np.float32) if place.index in large else honest
                task.submit({"w": value}, num_examples=1)
            return joined.arrays

    with LocalFederation(sites=5, rounds=1, seed=5, strategy="swarm", min_sites=2) as federation:
        outcomes = federation.outcomes(dict.fromkeys((f"site-{n}" for n in range(1, 6)), site), check=False)
        model = federation.model()["w"]
    assert [outcome.error for outcome in outcomes.values()] == [None] * 5
    expected = np.float32(0)
    for count, value in enumerate((1, 3, large[3], 5), 1):  # without site-2
        expected += (np.float32(value) - expected) * np.float32(1 / count)
    np.testing.assert_allclose(model, np.full(3, expected), rtol=1e-6)
