"""What a site refuses of a hostile server is on the site's own audit log, over mutual TLS."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_server import Hostile, W, changed_task, train
from study import Study, readdressed, until

from fl_adapters import FederationError, ProtocolError
from fl_adapters.cli.site.feed import JobFeed
from fl_adapters.participant.policy_gate import KitPolicyGate
from fl_runtime.client.control import ControlClient
from fl_runtime.transport.base import Peer
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.audit import Anchor, entries, verify
from fl_runtime.trust.identity import Identity
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

Change = Callable[[str, bytes], bytes]


class Watched(Hostile):
    """A hostile server that changes the answers to calls about jobs, too, and counts calls."""

    def __init__(self, study: Study, change: Change) -> None:
        super().__init__(study, change)
        self._jobs = study.server._guard._control
        study.server._guard._control = self
        self.calls = Counter[str]()

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        self.calls[method] += 1
        return super().handle(method, peer, requests)

    def control(self, method: str, caller: Identity, peer: Peer, request: bytes) -> Iterator[bytes]:
        self.calls[method] += 1
        for message in self._jobs.control(method, caller, peer, request):
            yield self._change(method, message)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north",)) as study:
        study.job()
        yield study


def setting(**values: Any) -> Change:
    def work(method: str, message: bytes) -> bytes:
        if method != "Join":
            return message
        reply = pb.JoinReply.FromString(message)
        reply.settings_json = json.dumps({**json.loads(reply.settings_json), **values})
        return reply.SerializeToString()

    return work


def config(text: str) -> Change:
    def change(task: pb.TaskHeader) -> None:
        task.config_json = text

    return changed_task(change)


def other_model() -> Change:
    arrays = {**W, "body": np.zeros((9, 9), np.float32)}

    def change(task: pb.TaskHeader) -> None:
        manifest = Manifest.of(arrays)
        task.payload.CopyFrom(frames.describe(manifest, manifest.digests(arrays, {}), known=False))
        names = [manifest.tensors[index].name for index in manifest.payload_order]
        task.payload.inline = b"".join(arrays[name].tobytes() for name in names)

    return changed_task(change)


def no_message(method: str, message: bytes) -> bytes:
    return b"\xff" * 40 if method == "Next" else message


def refusals(kit: Path) -> list[dict[str, Any]]:
    return [entry for entry in entries(kit) if entry["outcome"] == "refused"]


OWN_MODEL_STAYS = "cross_site: false (the site's policy.yml)"
CASES: dict[str, tuple[Change, str, str]] = {
    "settings of absurd value": (setting(rounds=2**33), "join", "protocol"),
    "a setting of another type": (setting(filters="\x1b[2J"), "join", "protocol"),
    "a local budget that is none": (setting(every="7 moons\x1b[2J"), "join", "config"),
    "a filter that does not exist": (setting(filters=[{"name": "Steal\x1b[2J"}]), "join", "config"),
    "a strategy that the policy refuses": (
        setting(cross_site=True),
        "join",
        "cross_site: false (the site's policy.yml)",
    ),
    "settings of a task": (config('{"held_version": -1}'), "next task", "protocol"),
    "a model of another shape": (other_model(), "task: train", "protocol"),
    "bytes that are no message": (no_message, "next task", "protocol"),
}


@pytest.mark.parametrize("what", CASES)
def test_what_a_site_refuses_is_on_its_own_audit_log(study: Study, what: str) -> None:
    change, action, rule = CASES[what]
    kit = readdressed(study, "north")
    with (kit / "policy.yml").open("a") as policy:
        policy.write("\ncross_site: false\n")
    Watched(study, change)
    with pytest.raises(FederationError) as caught:
        train(kit)
    (line,) = refusals(kit)
    assert (line["action"], line["rule"]) == (action, rule)
    assert line["error"] == caught.value.what and line["error"].isprintable()
    assert "/site/north?" in line["who"]
    assert verify(kit, Anchor(kit=kit))[1] == []
    until(lambda: all(call.left for call in tuple(study.server._guard._open)), "the site to end its calls")


def test_what_the_server_refuses_is_no_refusal_of_the_site(study: Study) -> None:
    def refusing(method: str, message: bytes) -> bytes:
        if method == "Join":
            raise ProtocolError("this job is not for you")
        return message

    kit = readdressed(study, "north")
    Watched(study, refusing)
    with pytest.raises(ProtocolError, match="this job is not for you"):
        train(kit)
    assert refusals(kit) == []


def test_assignments_that_the_daemon_cannot_read_do_not_fill_its_audit_log(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = readdressed(study, "north")

    def change(method: str, message: bytes) -> bytes:
        if method != "Assignment":
            return message
        name = {"job": "../x"} if hostile.calls[method] % 2 else {}
        return json.dumps({**json.loads(message), **name}).encode() if name else b"no JSON"

    hostile = Watched(study, change)
    gate = KitPolicyGate(kit)
    control = ControlClient(GrpcTransport(study.address, credentials=FileCredentials(kit)))
    feed = JobFeed(
        control,
        gate.witness(),
        lambda *line: None,
        threading.Event(),
        lambda error, answers: gate.refusals.record("assignment", error, answers=answers),
    )
    try:
        feed.update([], {"slots": 1, "gpus": 0, "memory_bytes": 0})
        until(lambda: hostile.calls["Assignment"] >= 3, "the daemon to ask again")
        assert [line["answers"] for line in refusals(kit)] == [1]
        monkeypatch.setattr("fl_adapters.cli.site.feed._REPEAT_S", 0.0)  # as if five minutes had passed
        until(lambda: len(refusals(kit)) > 1, "the next line about what was refused meanwhile")
    finally:
        feed.close()
    line, later = refusals(kit)[:2]
    assert (line["action"], line["rule"]) == ("assignment", "protocol")
    assert "assigns a job in a way that this site cannot read" in line["error"]
    assert later["answers"] >= 2
    assert not feed.arrived
    assert verify(kit, Anchor(kit=kit))[1] == []
