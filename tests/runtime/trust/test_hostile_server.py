"""A server that turns on its sites, over mutual TLS: whatever it sends, a site gives nothing away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import errors_together
from hostile_server import Hostile, changed_task, train
from study import Study, readdressed

from fl_adapters import ConfigError, FederationError, PermissionDeniedError, ProtocolError, connect
from fl_adapters.participant.kit import Kit, read_kit
from fl_runtime.trust.audit import entries
from fl_runtime.trust.audit.lines import COUNTER_FILE, HEAD_FILE, LOG_FILE
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

LOG_FILES = (LOG_FILE, HEAD_FILE, COUNTER_FILE, "renewals.json")
W = {"body": np.zeros((4, 3), np.float32), "head": np.ones(3, np.float32)}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north",)) as study:
        yield study


def holding(arrays: dict[str, Any]) -> Callable[[pb.TaskHeader], None]:
    """Put another model into a task."""

    def change(task: pb.TaskHeader) -> None:
        manifest = Manifest.of(arrays)
        task.payload.CopyFrom(frames.describe(manifest, manifest.digests(arrays, {}), known=False))
        task.payload.inline = b"".join(np.ascontiguousarray(arrays[spec.name]).tobytes() for spec in manifest.tensors)

    return change


@pytest.mark.parametrize(
    ("round", "error", "text"),
    [(0, PermissionDeniedError, "send its weights as the initial model"), (1, ProtocolError, "'initial' in round 1")],
)
def test_an_initial_model_is_what_it_is_whatever_round_the_server_names(
    tmp_path: Path, round: int, error: type[FederationError], text: str
) -> None:
    """The policy keeps north's own weights at home, so an honest server asks south; a round makes them no update."""
    with Study(tmp_path, ("north", "south")) as study:
        north, south = (readdressed(study, name) for name in study.sites)
        (north / "policy.yml").write_text("initial: false\n")
        study.job()

        def change(task: pb.TaskHeader) -> None:
            task.kind, task.round = "initial", round
            task.ClearField("payload")

        hostile = Hostile(study, changed_task(change))
        raised = errors_together(lambda: train(north), lambda: train(south))[0]
        assert isinstance(raised, error) and text in str(raised)
        assert {header.round for header in hostile.received} == {0}  # those of south
        assert not [entry for entry in entries(north) if entry["action"] == "update"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({**W, "body": np.full((4, 3), np.nan, np.float32)}, "NaN or infinite values in body"),
        ({**W, "body": np.full((4, 3), np.inf, np.float32)}, "NaN or infinite values in body"),
        ({**W, "secret": np.zeros(3, np.float32)}, "secret differs in name, shape or dtype"),
        ({"body": W["body"]}, "head differs in name, shape or dtype"),
        ({**W, "body": np.zeros((4, 3), np.float64)}, "body differs in name, shape or dtype"),
        ({**W, "body": np.zeros((3, 4), np.float32)}, "body differs in name, shape or dtype"),
    ],
    ids=["NaN", "infinite", "another tensor", "a tensor less", "another dtype", "another shape"],
)
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "under noise"])
def test_a_model_that_is_not_the_one_of_the_handshake_is_not_trained_on(
    study: Study, arrays: dict[str, Any], text: str, noise: bool
) -> None:
    kit = readdressed(study, "north")
    if noise:
        (kit / "policy.yml").write_text("filters: [{name: GaussianDP, noise_multiplier: 1.0, clip: 1.0}]\n")
    study.job()
    hostile = Hostile(study, changed_task(holding(arrays)))
    with pytest.raises(ProtocolError, match=text):
        train(kit)
    assert [header.round for header in hostile.received] == [0]  # the initial model; no update left
    assert not [entry for entry in entries(kit) if entry["action"] == "update" and entry["round"] > 0]


def test_a_tensor_that_stays_at_home_does_not_leave_because_a_task_names_it(study: Study) -> None:
    kit = readdressed(study, "north")
    study.job()
    hostile = Hostile(study, changed_task(holding(W)))
    with pytest.raises(ProtocolError, match="head differs"):
        train(kit, keep_local=["head"])
    assert all("head" not in [t.name for t in header.payload.manifest.tensors] for header in hostile.received)


@pytest.mark.parametrize(
    "name", ["/tmp/elsewhere", "../../elsewhere", "a/../b", "job/2/3", "job/x", "", "-rf", "a\nb", 7]
)
def test_a_name_of_a_job_is_a_name(study: Study, name: Any, tmp_path: Path) -> None:
    kit = readdressed(study, "north")
    study.job()

    def change(method: str, message: bytes) -> bytes:
        if method != "Join":
            return message
        reply = pb.JoinReply.FromString(message)
        settings = json.loads(reply.settings_json)
        reply.settings_json = json.dumps({**settings, "name": name})
        return reply.SerializeToString()

    Hostile(study, change)
    before = sorted(path for path in tmp_path.rglob("*") if path.name not in LOG_FILES)
    with pytest.raises(ProtocolError, match="does not accept as a name"):
        train(kit)
    assert sorted(path for path in tmp_path.rglob("*") if path.name not in LOG_FILES) == before


def test_a_server_with_certificates_is_on_another_machine_whatever_the_site_was_told(study: Study) -> None:
    """`run --results` lets a site write results on this machine. That makes no file of it the server's."""
    kit = readdressed(study, "north")
    study.job()
    key = next(kit.glob("key*.pem"))
    before = key.read_bytes()

    def change(method: str, message: bytes) -> bytes:
        if method == "Join":
            reply = pb.JoinReply.FromString(message)
            reply.shared_folder = str(kit)
            return reply.SerializeToString()
        if method == "Next" and not frames.is_frame(message):
            part = pb.TaskPart.FromString(message)
            if part.task.kind == "train":
                part.task.payload.inline, part.task.payload.file = b"", key.name
                return part.SerializeToString()
        return message

    hostile = Hostile(study, change)
    script_kit = Kit("job", "north", 0, 1, study.address, "", str(study.folder / "results"), True, credentials=str(kit))
    folder = script_kit.save(study.folder / "script-kit")
    with pytest.raises(FederationError):
        train(folder)
    assert key.read_bytes() == before
    assert [header.round for header in hostile.received] == [0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"credentials": ""}, "kit.json was changed after the kit was made"),
        ({"server": "127.0.0.1:1"}, "kit.json was changed after the kit was made"),
        ({"credentials": "", "token": "x", "simulated": True}, "kit.json was changed after the kit was made"),
    ],
    ids=["without credentials", "another server", "as in a simulation"],
)
def test_a_script_opens_a_kit_as_the_command_does(study: Study, change: dict[str, Any], text: str) -> None:
    """Started directly with $FL_ADAPTERS_KIT: a kit that was changed is refused, and never means plaintext."""
    kit = readdressed(study, "north")
    fields = json.loads((kit / "kit.json").read_text())
    (kit / "kit.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ConfigError, match=text), connect(kit=str(kit)):
        pass


def test_a_kit_without_any_secret_is_refused(tmp_path: Path) -> None:
    folder = Kit("job", "north", 0, 1, "127.0.0.1:1", "").save(tmp_path / "kit")
    with pytest.raises(ConfigError, match="neither a certificate nor a secret"):
        read_kit(folder)
