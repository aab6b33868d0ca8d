"""Hostile members over real sockets: no attack succeeds, and honest sites of the same run finish undisturbed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, at_once, registered, started
from study import Study

from fl_runtime.errors import (
    AbortedError,
    ConfigError,
    FederationError,
    PermissionDeniedError,
    ProtocolError,
    StateMismatchError,
    TransferDamagedError,
    UpdateRefusedError,
)
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Arrays, Task
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

W: Arrays = {"a.weight": np.zeros((300, 1000), np.float32), "b.bias": np.zeros(7, np.float32)}  # travels in frames


def refused(call: Callable[[], Any]) -> FederationError:
    """Make a call that must not succeed, and return its error."""
    with pytest.raises(FederationError) as caught:
        call()
    return caught.value


@dataclass
class Siege:
    """A run of three sites in round 1 of 2; two are honest, and the third has a valid certificate to attack with."""

    study: Study
    evil: Site
    task: Task
    honest: list[Site]
    tasks: dict[str, Task]

    @property
    def attempt(self) -> int:
        return self.evil.welcome.attempt

    def send(self, *messages: bytes, method: str = "Submit", of: str = "evil") -> list[bytes]:
        transport = self.evil.transport if of == "evil" else self.study.transport(of)
        return list(transport.call(method, iter(messages)))

    def header(self, arrays: Arrays = W, **fields: Any) -> pb.UpdateHeader:
        """Return a valid header with these fields changed."""
        manifest = Manifest.of(arrays)
        payload = frames.describe(manifest, manifest.digests(arrays, {}), known=False)
        values = {"round": 1, "content": "weights", "num_examples": 1, "payload": payload, **fields}
        values.setdefault("session", pb.Session(job="job", attempt=self.attempt))
        return pb.UpdateHeader(**values)

    def submit(self, header: pb.UpdateHeader, *after: bytes) -> FederationError:
        """Send a header and frames that must be refused; return the error."""
        message = pb.UpdatePart(update=header).SerializeToString()
        return refused(lambda: self.send(message, *after))

    def finish(self) -> Arrays:
        """Let the honest sites finish; return the final weights."""

        def work(site: Site) -> None:
            task = self.tasks[site.name]
            while task.kind == "train":
                step = 1.0 + self.honest.index(site)
                assert site.submit(task, {n: a + np.float32(step) for n, a in task.arrays.items()}) == "used"
                task = site.client.next_task()
            site.client.leave("done", early=False)

        at_once(self.honest, work)
        assert self.study.server.wait_for_job("job", 60)
        outcome = self.study.server.outcome("job")
        assert outcome["error"] is None
        assert [item["sites"] for item in outcome["rounds"]] == [["north", "south"]] * 2
        return read_tensors(Path(outcome["folder"]) / "model/model.safetensors")


@pytest.fixture
def siege(tmp_path: Path) -> Iterator[Siege]:
    with Study(tmp_path, ("north", "south", "evil")) as study:
        study.job(min_sites=2, deadline_s=60)
        sites = [study.site(name) for name in study.sites]
        tasks = started(sites, W)
        yield Siege(study, sites[2], tasks["evil"], sites[:2], tasks)


def undisturbed(siege: Siege) -> None:
    """Revoke the hostile site; the honest ones must finish exactly as they would have alone."""
    _, crl = siege.study.authority.revoke("evil")
    siege.study.admin().ask("Revoke", crl=crl.decode())
    model = siege.finish()
    for name, array in model.items():
        np.testing.assert_array_equal(array, np.full_like(W[name], 3.0))


def test_a_site_speaks_for_itself_alone(siege: Siege) -> None:
    """Whatever name, job or attempt a message names, it counts for the certificate's holder or not at all."""
    assert isinstance(siege.submit(siege.header(session=pb.Session(job="other", attempt=1))), ProtocolError)
    for attempt in (0, 2, 7, 2**32 - 1):
        assert isinstance(siege.submit(siege.header(session=pb.Session(job="job", attempt=attempt))), AbortedError)
    update = pb.LeaveRequest(session=pb.Session(job="job", attempt=siege.honest[0].welcome.attempt), early=True)
    siege.send(update.SerializeToString(), method="Leave")  # with north's attempt: it is the same number
    sites = siege.study.admin().ask("Status")["running"]["sites"]
    assert (sites["north"].split(";")[0], sites["evil"][:4]) == ("connected", "gone")
    undisturbed(siege)


def test_replayed_and_repeated_updates_count_once(siege: Siege) -> None:
    north, south = siege.honest
    small = {"a.weight": W["a.weight"], "b.bias": W["b.bias"]}
    taken: list[bytes] = []
    manifest = Manifest.of(small)
    step = {name: array + np.float32(1) for name, array in small.items()}
    header = siege.header(step, session=pb.Session(job="job", attempt=north.welcome.attempt))
    message = pb.UpdatePart(update=header).SerializeToString()
    sent = [message, *frames.frames(manifest.pieces(step, {}))]

    def status(name: str) -> str:
        transport = siege.study.transport(name)
        return str(pb.SubmitReply.FromString(list(transport.call("Submit", iter(sent)))[-1]).accepted.status)

    assert status("north") == "used"
    assert [status("north") for _ in range(3)] == ["duplicate"] * 3
    taken.extend(sent)  # what somebody has recorded, sent by somebody else, counts as somebody else's
    siege.evil.client.leave("", early=True)
    south.submit(siege.tasks["south"], {n: a + np.float32(2) for n, a in W.items()})
    assert south.client.next_task().round == 2
    assert status("north") == "duplicate", "of a round that is over"
    header.session.attempt = siege.attempt
    for round_ in (0, 2, 3, 2**32 - 1):
        header.round = round_
        assert siege.submit(header).what == "evil has left this run"
    north.client.next_task()


def test_updates_of_a_finished_job_are_refused(siege: Siege) -> None:
    undisturbed(siege)
    message = pb.UpdatePart(update=siege.header(round=2)).SerializeToString()

    def refused_of_all() -> None:
        for name in ("north", "evil"):
            answers = []
            try:
                answers = siege.send(message, of=name)
            except (AbortedError, PermissionDeniedError, ProtocolError, UpdateRefusedError):
                continue
            assert pb.SubmitReply.FromString(answers[-1]).accepted.status in ("duplicate", "late")

    refused_of_all()
    siege.study.job("next", sites=["north"])
    refused_of_all()
    for number in range(5):  # the server forgets the processes of jobs that ended long ago
        siege.study.job(f"short-{number}", sites=["evil"])
        siege.study.admin("lena").ask("AbortJob", job=f"short-{number}")
    assert "does not run here any more" in refused(lambda: siege.send(message, of="north")).what


def tensor(**fields: Any) -> pb.Tensor:
    return pb.Tensor(**{"name": "a", "dtype": "float32", "shape": [1], **fields})


def many(count: int) -> Sequence[pb.Tensor]:
    one = pb.Manifest(tensors=[tensor(shape=[])]).SerializeToString()
    return pb.Manifest.FromString(one * count).tensors


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[], Sequence[pb.Tensor]], str]] = {
    "NUL": (lambda: [tensor(name="a\0b")], "not printable"),
    "line end": (lambda: [tensor(name="a\nb")], "not printable"),
    "2 kB name": (lambda: [tensor(name="n" * 2**11)], "longer than"),
    "1 MB name": (lambda: [tensor(name="n" * 2**20)], "a message describes tensors in 10485"),
    "no name": (lambda: [tensor(name="")], "is empty"),
    "twice": (lambda: [tensor(), tensor()], "same tensor twice"),
    "a million tensors": (lambda: many(1_000_000), "too large for gRPC"),
    "201,000 tensors": (lambda: many(201_000), "a message describes tensors in"),
    "object dtype": (lambda: [tensor(dtype="object")], "object"),
    "pickle dtype": (lambda: [tensor(dtype="|O")], "O"),
    "structured dtype": (lambda: [tensor(dtype="f4,f4")], "f4,f4"),
    "too large": (lambda: [tensor(shape=[2**45])], "is larger than"),
    "overflowing": (lambda: [tensor(shape=[2**32, 2**32])], "is larger than"),
    "huge beside zero": (lambda: [tensor(shape=[2**63, 0])], "is larger than"),
    "33 dimensions": (lambda: [tensor(shape=[1] * 33)], "33 dimensions"),
    "other tensors": (lambda: [tensor(name="../../etc/passwd")], "differs from the agreed model"),
}


def test_manifests_that_lie_or_are_too_large_are_refused(siege: Siege) -> None:
    for what, (tensors, says) in HOSTILE_MANIFESTS.items():
        manifest = pb.Manifest(tensors=tensors())
        header = siege.header()
        header.payload.manifest.CopyFrom(manifest)
        header.payload.layout = Manifest.from_proto(manifest).layout if what == "other tensors" else b"?" * 16
        error = siege.submit(header)
        assert says in error.what, (what, error.what)
        assert isinstance(error, (ProtocolError, ConfigError, StateMismatchError)), what
        request = pb.RegisterRequest(session=pb.Session(job="job", attempt=siege.attempt), manifest=manifest)
        again = refused(lambda request=request: siege.send(request.SerializeToString(), method="Register"))
        assert isinstance(again, (ProtocolError, ConfigError, StateMismatchError)), what
    assert {entry["action"] for entry in siege.study.refusals()} == {"Submit", "Register"}
    undisturbed(siege)


def test_payloads_that_lie_are_refused(siege: Siege) -> None:
    good = list(frames.frames(Manifest.of(W).pieces(W, {})))
    huge = b"\x7a" + b"\xff" * 9 + b"\x01"
    cases: dict[str, tuple[pb.UpdateHeader, list[bytes], type[FederationError], str]] = {
        "no frames": (siege.header(), [], TransferDamagedError, "an upload ended after 0 bytes"),
        "short": (siege.header(), [frames.frame([memoryview(b"x" * 100)])], TransferDamagedError, "ended after 100"),
        "too long": (siege.header(), [*good, *good], ProtocolError, ""),
        "no frame": (siege.header(), [b"hello"], ProtocolError, "an upload has no frame"),
        "empty": (siege.header(), [b""], ProtocolError, "an upload has no frame"),
        "length that lies": (siege.header(), [b"\x7a\x10abc"], ProtocolError, "says it holds 16 bytes but holds 3"),
        "endless length": (siege.header(), [huge], ProtocolError, "ends before its length field"),
        "wrong digests": (
            siege.header({n: a + 1 for n, a in W.items()}),
            good,
            TransferDamagedError,
            "damaged in transfer: a.weight",
        ),
    }
    cases.pop("too long")  # what comes after the last byte is not read: tested below
    for what, (header, after, kind, says) in cases.items():
        error = siege.submit(header, *after)
        assert isinstance(error, kind), (what, error)
        assert says in error.what, what
    for field, value in (("total_bytes", 2**63), ("total_bytes", 0), ("digests", b"short"), ("layout", b"unknown")):
        header = siege.header()
        setattr(header.payload, field, value)
        assert isinstance(siege.submit(header, *good), ProtocolError)
    inline = siege.header()
    inline.payload.inline = b"x" * 2_000_000
    assert "an update brings 2000000 bytes" in siege.submit(inline).what
    undisturbed(siege)


def test_numbers_and_texts_beyond_reason_are_refused(siege: Siege) -> None:
    cases = {
        "num_examples is 0": {"num_examples": 0},
        "num_examples is 18446744073709551615": {"num_examples": 2**64 - 1},
        "local_steps is": {"local_steps": 2**64 - 1},
        "the content of an update is 'pickle'": {"content": "pickle"},
        "the stage of an update is": {"stage": "s" * 10**6},
        "the encoding of an update is": {"encoding": "e" * 10**6},
        "metrics are not": {"metrics_json": "[" * 10**6},
        "metrics are not a JSON object": {"metrics_json": '{"loss": "low"}'},
        "1001 metrics": {"metrics_json": json.dumps({str(n): 1 for n in range(1001)})},
    }
    for says, fields in cases.items():
        assert says in siege.submit(siege.header(**fields)).what
    scores = {
        "sent a score of model 7": pb.ScoreRequest(version=7, num_examples=1),
        "num_examples is": pb.ScoreRequest(version=0, num_examples=2**63),
    }
    for says, request in scores.items():
        request.session.CopyFrom(pb.Session(job="job", attempt=siege.attempt))
        message = request.SerializeToString()
        assert says in refused(lambda message=message: siege.send(message, method="Score")).what
    register = pb.RegisterRequest(session=pb.Session(job="job", attempt=siege.attempt), info={"x": "y" * 10**6})
    assert (
        "an entry of more than 4096 characters"
        in refused(lambda: siege.send(register.SerializeToString(), method="Register")).what
    )
    undisturbed(siege)


def test_what_travels_beside_the_weights_is_bounded_and_equal(siege: Siege) -> None:
    """Tensors beside the weights can neither fill the disk nor break the others' sum."""
    flood = [pb.Tensor(name=f"extra{n}", dtype="float32", shape=[2**40], extra=True) for n in range(4)]
    header = siege.header()
    header.payload.manifest.tensors.extend(flood)
    header.payload.layout = Manifest.from_proto(header.payload.manifest).layout
    assert "the limit is" in siege.submit(header).what
    north = siege.honest[0]
    for site in siege.honest:
        site.submit(siege.tasks[site.name], {n: a + np.float32(1.5) for n, a in W.items()})
    with pytest.raises(UpdateRefusedError, match="extra tensors differ"):
        siege.evil.submit(siege.task, W, extras={"momentum": np.zeros(5)})
    with pytest.raises(UpdateRefusedError, match="num_examples"):
        siege.evil.submit(siege.task, W, num_examples=0)
    with pytest.raises(UpdateRefusedError, match="not finite|NaN"):
        siege.evil.submit(siege.task, {**W, "b.bias": np.full(7, np.nan, np.float32)})
    siege.evil.client.leave("", early=True)
    assert north.client.next_task().round == 2


def test_a_site_that_describes_ever_new_tensors_is_stopped(siege: Siege, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_runtime.server.calls import limits

    monkeypatch.setattr(limits, "MAX_DESCRIBED", 1_000)
    blobs = siege.study.runs / "job/server/blobs"
    refusals = 0
    for number in range(40):
        extras = {f"x{number}-{n}": np.zeros(1, np.float32) for n in range(50)}
        manifest = Manifest.of(W, extras)
        payload = frames.describe(manifest, manifest.digests(W, extras), known=False)
        error = siege.submit(siege.header(payload=payload), b"no frame")
        refusals += "has described more than 1000 tensors" in error.what
    assert refusals > 15
    assert len(list(blobs.iterdir())) < 12, "layouts that do not come back hold no disk"
    undisturbed(siege)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([pb.TunnelPart(peer="nobody", stream="s")], "'nobody', which is not a site of this run"),
        ([pb.TunnelPart(peer="north", stream="s" * 100_000)], "longer than 200 characters"),
        ([pb.TunnelPart(peer="evil", stream=str(n), opened="x") for n in range(3_000)], "more than 1024 streams"),
    ],
    ids=["a stranger", "a long name", "ever more streams"],
)
def test_streams_between_sites_are_for_sites_and_bounded(siege: Siege, parts: list[pb.TunnelPart], says: str) -> None:
    hold = threading.Event()

    def messages(job: str) -> Iterator[bytes]:
        yield pb.TunnelPart(session=pb.Session(job=job, attempt=siege.attempt)).SerializeToString()
        yield from (part.SerializeToString() for part in parts)
        hold.wait(60)

    transport = siege.evil.transport
    with ExitStack() as end:
        end.callback(hold.set)
        assert "does not run here" in refused(lambda: list(transport.call("Tunnel", messages("other")))).what
        error = refused(lambda: list(transport.call("Tunnel", messages("job"))))
    assert isinstance(error, ProtocolError)
    assert says in error.what
    undisturbed(siege)


def test_no_message_is_unpickled_or_runs(siege: Siege, tmp_path: Path) -> None:
    """Pickles in every place that takes bytes or text."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    for method in ("Join", "Register", "Attend", "Next", "Submit", "Score", "Leave"):
        try:
            siege.send(bomb, method=method)
        except FederationError:
            continue
        assert method == "Attend"
    header = siege.header()
    header.payload.digests = bomb
    siege.submit(header, frames.frame([memoryview(bomb)]))
    assert not (tmp_path / "exploded").exists()


def test_a_site_that_stays_silent_holds_nobody_up_beyond_the_deadline(tmp_path: Path) -> None:
    """It registers, opens an upload, sends one frame and then nothing."""
    with Study(tmp_path, ("north", "south", "evil")) as study:
        study.job(min_sites=2, deadline_s=4.0)
        sites = [study.site(name) for name in study.sites]
        assert registered(sites, W)
        tasks = {site.name: site.start(W) for site in sites}
        siege = Siege(study, sites[2], tasks["evil"], sites[:2], tasks)
        stop = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield pb.UpdatePart(update=siege.header()).SerializeToString()
            yield frames.frame([memoryview(b"x")])
            stop.wait(60)

        call = siege.evil.transport.call("Submit", slowly())
        assert pb.SubmitReply.FromString(next(call)).send_from == 0
        try:
            for name, array in siege.finish().items():
                np.testing.assert_array_equal(array, np.full_like(W[name], 3.0))
        finally:
            stop.set()
            call.cancel()


def test_a_refusal_is_on_record_with_identity_action_and_rule(siege: Siege) -> None:
    siege.submit(siege.header(num_examples=0))
    refused(lambda: siege.send(b"{}", method="Revoke"))
    (first, second) = siege.study.refusals()
    assert [Identity.from_uri(entry["who"]).name for entry in (first, second)] == ["evil", "evil"]
    assert (first["action"], first["rule"]) == ("Submit", "update-refused")
    assert (second["action"], second["rule"][:19]) == ("Revoke", "permissions: Revoke")
    assert all(entry["error"] and entry["address"].startswith("ipv4:127.0.0.1") for entry in (first, second))
