"""Runs and exchanges recorded with version 0.1.0: a journal, and the wire, that every later version must read.

`tests/fixtures/v1/journal` holds server folders of three runs of two sites, stopped in round 3 with the update of
site-1 in the journal. `tests/fixtures/v1/exchange` holds all messages of a site and its server, call by call;
`tests/fixtures/0.1.0/exchange` those of the last release, by `record_exchange.py`.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once, ended, settings

from fl_runtime.server import Server
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Arrays, Report, RunSettings, Task
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
RECORDED = FIXTURES / "v1"
EXCHANGES = pytest.mark.parametrize("version", ["v1", "0.1.0"])

INITIAL = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.bias": np.zeros(2, np.float16),
    "steps": np.array(0, np.int64),
}
STRATEGIES = {"fedavg": None, "fedadam": "fedadam:lr=0.1", "fedbuff": "fedbuff:k=2"}


def trained(task: Task, by: float) -> Arrays:
    """A site's local training: add `by` to every value."""
    return {name: (array + np.asarray(by, array.dtype)).astype(array.dtype) for name, array in task.arrays.items()}


def recorded_settings(strategy: str | None) -> RunSettings:
    fields = {} if strategy is None else {"strategy": strategy}
    return settings(2, rounds=4, seed=7, **fields)


def finish(server: Server, number: int) -> Arrays:
    """Site `number` comes back and answers every task until the run ends; returns the final weights."""
    site = Site(f"site-{number}", MemoryTransport(server.service, f"site-{number}"))
    site.join()
    site.register(INITIAL, evaluates=True)
    task = site.client.next_task()
    while task.kind == "train":
        site.submit(task, trained(task, number), num_examples=10 * number, local_steps=3)
        task = site.client.next_task()
    final = {name: np.copy(array) for name, array in task.arrays.items()}
    site.client.report(Report("test", task.version, site.name, {"loss": 0.1}, 5))
    site.client.leave("all rounds are done", early=False)
    site.client.close()
    return final


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_version_0_1_0_began_is_finished(name: str, tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "journal" / name / "server", tmp_path / "server")
    run = recorded_settings(STRATEGIES[name])
    server = Server(run, tmp_path, dict.fromkeys(run.sites, "secret"))
    server.begin()
    finals = at_once([1, 2], lambda number: finish(server, number))
    ended(server)
    result = server.result()
    server.close()
    for key, array in finals[0].items():
        np.testing.assert_array_equal(array, finals[1][key])
    if name == "fedbuff":  # the order in which the sites answer decides
        assert [r.round for r in result.rounds][:1] == [1] and len(result.rounds) == 4
        return
    assert [r.round for r in result.rounds] == [1, 2, 3, 4]
    expected = read_tensors(RECORDED / "journal" / name / "expected.safetensors")
    for key, array in finals[0].items():  # the bits that 0.1.0 itself ends with
        np.testing.assert_array_equal(array, expected[key])
    if name == "fedavg":  # (10 * 1 + 20 * 2) / 30 a round, for four rounds
        np.testing.assert_allclose(finals[0]["layer.weight"], INITIAL["layer.weight"] + 4 * 5 / 3, rtol=1e-6)


def recorded_calls(version: str, name: str) -> list[dict[str, Any]]:
    document = json.loads(gzip.decompress((FIXTURES / version / "exchange" / f"{name}.json.gz").read_bytes()))
    return [
        {side: [base64.b64decode(m) for m in call[side]] for side in ("requests", "replies")}
        | {"method": call["method"]}
        for call in document["calls"]
    ]


@EXCHANGES
@pytest.mark.parametrize("name", ["small", "framed"])
def test_a_server_understands_a_site_of_version_0_1_0(name: str, version: str, tmp_path: Path) -> None:
    run = settings(1, rounds=2, seed=7)
    server = Server(run, tmp_path, {"site-1": "secret"})
    server.begin()
    transport = MemoryTransport(server.service, "site-1")
    statuses = []
    for call in recorded_calls(version, name):
        replies = list(transport.call(call["method"], iter(call["requests"])))
        assert len(replies) >= len(call["replies"])  # and beats while the server is busy
        if call["method"] == "Submit":
            statuses.append(pb.SubmitReply.FromString(replies[-1]).accepted.status)
    ended(server)
    result = server.result()
    exported = server.export(tmp_path / "model")
    server.close()
    assert statuses == ["used"] * 3  # the initial model and two rounds
    assert [r.metrics["train_loss"] for r in result.rounds] == [0.5, 0.5]
    assert exported is not None
    weights = read_tensors(exported)
    first = next(iter(weights.values()))
    before = INITIAL["layer.weight"] if name == "small" else np.arange(300_000, dtype=np.float32) % 8
    np.testing.assert_array_equal(first, before + 2)  # one more in each of two rounds


class Replayed:
    """A transport that answers as the recorded server did, one call after the other."""

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        self._calls = iter(calls)

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Any:
        if method == "Attend":
            return Replies(iter(()), iter(()))
        recorded = next(self._calls)
        assert method == recorded["method"]
        sent = iter([requests] if isinstance(requests, bytes) else requests)
        return Replies(sent, iter(recorded["replies"]))

    def close(self) -> None:
        pass


class Replies:
    def __init__(self, sent: Iterator[bytes], replies: Iterator[bytes]) -> None:
        self._sent, self._replies = sent, replies

    def __iter__(self) -> Replies:
        return self

    def __next__(self) -> bytes:
        next(self._sent, None)
        return next(self._replies)

    def when_gone(self, callback: Any) -> bool:
        return True

    def cancel(self, *, broken: bool = False) -> None:
        pass


@EXCHANGES
@pytest.mark.parametrize("name", ["small", "framed"])
def test_a_site_understands_a_server_of_version_0_1_0(name: str, version: str) -> None:
    before: Arrays = INITIAL if name == "small" else {"w": np.arange(300_000, dtype=np.float32) % 8}
    site = Site("site-1", Replayed(recorded_calls(version, name)))
    assert site.join().settings["rounds"] == 2
    assert site.register(before, evaluates=True, every="epoch") == 2
    task = site.start(before)
    for number in (1, 2):
        assert (task.kind, task.round, task.version) == ("train", number, number - 1)
        for key, array in before.items():
            np.testing.assert_array_equal(task.arrays[key], array + np.asarray(number - 1, array.dtype))
        assert (
            site.submit(task, trained(task, 1), num_examples=10, local_steps=3, metrics={"train_loss": 0.5}) == "used"
        )
        task = site.client.next_task()
        site.client.report(Report("test", task.version, "site-1", {"loss": 0.25}, 5))
    assert task.kind == "final"
    site.client.leave("all rounds are done", early=False)
    site.client.close()
