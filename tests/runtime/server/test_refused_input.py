"""Bad input is refused before round 1, at the site and the server, with what is wrong, where, and what to do."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, Site, errors_at_once, serving, settings, together

from fl_runtime import errors as all_errors
from fl_runtime.errors import (
    AbortedError,
    ConfigError,
    FederationError,
    HandshakeError,
    PermissionDeniedError,
    ProtocolError,
    StateMismatchError,
    TransferDamagedError,
    UpdateRefusedError,
)
from fl_runtime.server import Server
from fl_runtime.server.calls.service import FederationService
from fl_runtime.server.courses.joining import Joining
from fl_runtime.server.records.events import Events
from fl_runtime.server.run import Run
from fl_runtime.store.stores import FolderStore
from fl_runtime.store.tensorfile import write_tensors
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Arrays
from fl_runtime.version import PROTOCOL_MAX, PROTOCOL_MIN
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

GOOD: Arrays = {"a.weight": np.zeros((3, 2), np.float32), "b.bias": np.zeros(2, np.float32)}


def registering(bench: Bench, states: list[Arrays], **each: list[Any]) -> list[BaseException | None]:
    """Register every site, and return the error that each gets, or None."""
    sites = [bench.site(name) for name in bench.names]
    for site in sites:
        site.join()
    return errors_at_once(
        range(len(sites)), lambda i: sites[i].register(states[i], **{key: values[i] for key, values in each.items()})
    )


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"a.weight": GOOD["a.weight"]}, "b.bias: float32[2] != missing"),
        ({**GOOD, "c": np.zeros(1)}, "c: missing != float64[1]"),
        ({**GOOD, "b.bias": np.zeros(8, np.float32)}, "b.bias: float32[2] != float32[8]"),
        ({**GOOD, "b.bias": np.zeros(2)}, "b.bias: float32[2] != float64[2]"),
        ({**GOOD, "b.bias": np.zeros((2, 1), np.float32)}, "b.bias: float32[2] != float32[2, 1]"),
    ],
    ids=["missing", "extra", "shape", "dtype", "dimensions"],
)
def test_models_that_differ_are_refused_before_round_1_at_every_site(tmp_path: Path, other: Arrays, line: str) -> None:
    with serving(tmp_path, 3) as bench:
        for error in registering(bench, [GOOD, other, GOOD]):
            assert isinstance(error, StateMismatchError)
            assert line in error.what
            assert "site-1 and site-2" in error.what
            assert "before round 1" in error.where
            assert "keep_local" in error.fix
    assert not bench.watch.all("round_started")


def test_the_order_of_tensors_may_differ(tmp_path: Path) -> None:
    def site(name: str) -> Arrays:
        weights = dict(sorted(GOOD.items(), reverse=name == "site-2"))
        return bench.site(name).take_part(weights, lambda task: {n: a + 1 for n, a in task.arrays.items()})

    with serving(tmp_path, 2, rounds=1) as bench:
        finals = bench.run(site)
    assert all((final["b.bias"] == 1).all() and final["a.weight"].shape == (3, 2) for final in finals.values())


def test_a_long_list_of_differences_arrives_shortened_but_with_its_number(tmp_path: Path) -> None:
    names = [f"schicht.{'ü' * 700}.{i}" for i in range(50)]
    small, large = ({name: np.zeros(size) for name in names} for size in (1, 2))
    with serving(tmp_path, 2) as bench:
        for error in registering(bench, [small, large]):
            assert isinstance(error, StateMismatchError)
            assert "do not agree in 50 tensors" in error.what
            assert error.fix


def test_values_that_must_agree_are_named_with_both_sides(tmp_path: Path) -> None:
    with serving(tmp_path, 3) as bench:
        for error in registering(bench, [GOOD] * 3, rank=["8", "8", "16"], base=["x", "x", "x"]):
            assert type(error) is HandshakeError
            assert "rank: 8 != 16" in error.what
            assert "site-1 and site-3" in error.what
            assert "base" not in error.what


def test_trainers_with_different_budgets_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 3, rounds=None) as bench:
        for error in registering(bench, [GOOD] * 3, rounds=[0, 5, 6]):
            assert isinstance(error, HandshakeError)
            assert "site-2: 5, site-3: 6" in error.what
            assert "--rounds" in error.fix


def test_an_initial_model_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    write_tensors(path, {"a.weight": np.zeros((3, 2), np.float32), "b.bias": np.zeros(5, np.float32)})
    with serving(tmp_path, 2, initial=str(path)) as bench:
        sites = [bench.site(name) for name in bench.names]
        for site in sites:
            site.join()
        for error in errors_at_once(sites, lambda site: (site.register(GOOD), site.client.next_task())):
            assert isinstance(error, StateMismatchError)
            assert "b.bias: float32[2] != float32[5]" in error.what
            assert error.where == str(path)


def test_an_initial_model_that_is_no_tensor_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "start.bin").write_bytes(b"\x80\x04 a pickle, say")
    with serving(tmp_path, 1, initial=str(tmp_path / "start.bin")) as bench:
        site = bench.site("site-1")
        site.join()
        with pytest.raises(ConfigError, match="not a usable safetensors file"):
            _ = site.register(GOOD), site.client.next_task()


def test_no_site_is_asked_for_weights_that_the_job_gives(tmp_path: Path) -> None:
    """Not even between the handshake and the moment when the server reads the file."""
    run = Run(settings(1, initial=str(tmp_path / "start.safetensors")), tmp_path, Events(()), FolderStore())
    site = Site("site-1", MemoryTransport(FederationService(run), "site-1"))
    attempt = site.join().attempt
    joining = run.course
    assert isinstance(joining, Joining)
    together(joining.handshake, lambda: site.register(GOOD))
    assert run.state.phase == "initial"
    assert next(run.wait_for_task("site-1", attempt, best=False, beat_s=0.01)) is None
    site.vanish()


# -- updates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_are_refused_by_name_and_the_round_goes_on(tmp_path: Path, value: float) -> None:
    with serving(tmp_path, 1, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        site, task = sites["site-1"], tasks["site-1"]
        bad = np.zeros(2, np.float32)
        bad[1] = value
        with pytest.raises(UpdateRefusedError, match=r"b\.bias") as caught:
            site.submit(task, {**GOOD, "b.bias": bad})
        assert caught.value.where == "update of site-1, round 1"
        assert "keep_local" in caught.value.fix
        with pytest.raises(UpdateRefusedError, match="momentum"):
            site.submit(task, GOOD, extras={"momentum": bad})
        assert site.submit(task, GOOD) == "used"


@pytest.mark.parametrize("number", [0, -3])
def test_updates_without_examples_are_refused(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, 1, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        with pytest.raises(UpdateRefusedError, match="num_examples is 0") as caught:
            sites["site-1"].submit(tasks["site-1"], GOOD, num_examples=number)
        assert "site-1, round 1" in caught.value.where
        assert sites["site-1"].submit(tasks["site-1"], GOOD) == "used"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"a.weight": GOOD["a.weight"]}, "b.bias: float32[2] != missing"),
        ({**GOOD, "c": np.zeros(1)}, "c: missing != float64[1]"),
        ({**GOOD, "b.bias": np.zeros(3, np.float32)}, "b.bias: float32[2] != float32[3]"),
        ({**GOOD, "b.bias": np.zeros(2)}, "b.bias: float32[2] != float64[2]"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_updates_with_other_tensors_than_agreed_are_refused(tmp_path: Path, changed: Arrays, line: str) -> None:
    with serving(tmp_path, 1, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        with pytest.raises(StateMismatchError) as caught:
            sites["site-1"].submit(tasks["site-1"], changed)
        assert line in caught.value.what
        assert sites["site-1"].submit(tasks["site-1"], GOOD) == "used"


def test_an_update_for_a_round_to_come_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=3) as bench:
        sites, tasks = bench.started(GOOD)
        from dataclasses import replace

        with pytest.raises(ProtocolError, match="round 1 is open"):
            sites["site-1"].submit(replace(tasks["site-1"], round=3), GOOD)


def test_metrics_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        with pytest.raises(ConfigError, match="'confusion'"):
            sites["site-1"].submit(tasks["site-1"], GOOD, metrics={"confusion": [[1, 2], [3, 4]]})


# -- the job and the server ----------------------------------------------------------------------------------------


def make_server(folder: Path, sites: Any = 2, **fields: Any) -> Server:
    return Server(settings(sites, **fields), folder, {})


def test_an_unknown_strategy_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedyolo") as caught:
        make_server(tmp_path, strategy="fedyolo")
    assert "fedavg" in caught.value.fix


def test_more_needed_sites_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_sites is 3, but the job has 2 sites"):
        make_server(tmp_path, min_sites=3)


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_sites_without_distinct_names_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="distinct names"):
        make_server(tmp_path, names, min_sites=0)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(settings(1), tmp_path, {"site-1": "x"}, port=port)
        with pytest.raises(ConfigError, match=f"port {port}") as caught:
            server.start()
        assert "another port" in caught.value.fix
        server.close()


def test_two_servers_do_not_share_a_port(tmp_path: Path) -> None:
    with serving(tmp_path / "a", 1) as bench:
        port = int(bench.address.rpartition(":")[2])
        server = Server(settings(1), tmp_path / "b", {"site-1": "x"}, port=port)
        with pytest.raises(ConfigError, match=f"port {port}"):
            server.start()
        server.close()


# -- strangers, other versions, and hostile bytes ------------------------------------------------------------------


@pytest.mark.parametrize("token", ["guessed", "", "secret of site-1 ", "secret of site-3"])
def test_a_stranger_is_turned_away(tmp_path: Path, token: str) -> None:
    with serving(tmp_path, 1) as bench:
        from fl_runtime.transport.grpc import GrpcTransport

        site = Site("site-1", GrpcTransport(bench.address, token))
        with pytest.raises(PermissionDeniedError, match="not a site of this run"):
            site.join()
        site.vanish()
        assert not bench.watch.all("joined")


def test_a_site_cannot_speak_for_another(tmp_path: Path) -> None:
    with serving(tmp_path, 2) as bench:
        site = bench.site("site-1", token="secret of site-2")
        assert site.join().site == "site-2"


def call(bench: Bench, method: str, *messages: bytes, name: str = "site-1") -> list[bytes]:
    """Send raw messages, and return the raw answers."""
    return list(bench.site(name).transport.call(method, iter(messages)))


@pytest.mark.parametrize(
    ("lowest", "highest", "older"), [(0, PROTOCOL_MIN - 1, "site"), (PROTOCOL_MAX + 1, 99, "server")]
)
def test_another_protocol_is_refused_with_the_upgrade_to_make(
    tmp_path: Path, lowest: int, highest: int, older: str
) -> None:
    request = pb.JoinRequest(protocol_min=lowest, protocol_max=highest, version="7.7.7")
    with serving(tmp_path, 1) as bench, pytest.raises(ProtocolError, match="protocol") as caught:
        call(bench, "Join", request.SerializeToString())
    assert caught.value.fix.startswith(f"upgrade the {older}")
    assert "7.7.7" in caught.value.where


def test_a_kit_of_another_job_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as bench, pytest.raises(ProtocolError, match="'test', not 'other'"):
        bench.site("site-1").client.join("other")


@pytest.mark.parametrize("method", ["Join", "Register", "Attend", "Next", "Submit", "Score", "Leave"])
@pytest.mark.parametrize("message", [b"", b"\xff\xff\xff", b"\x08", b"\x7a\x03abc"], ids=["", "ff", "cut", "frame"])
def test_bytes_that_are_no_message_get_an_error_and_harm_nobody(tmp_path: Path, method: str, message: bytes) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        with pytest.raises((ProtocolError, AbortedError)):
            call(bench, method, message)
        assert sites["site-1"].submit(tasks["site-1"], GOOD) == "used"


def raw_update(site: Site, arrays: Arrays, **changes: Any) -> pb.UpdateHeader:
    manifest = Manifest.of(arrays)
    payload = frames.describe(manifest, manifest.digests(arrays, {}), known=False)
    payload.inline = b"".join(manifest.pieces(arrays, {}))
    header = pb.UpdateHeader(
        session=pb.Session(job="test", attempt=site.welcome.attempt),
        round=1,
        content="weights",
        num_examples=1,
        payload=payload,
    )
    for key, value in changes.items():
        part, _, field = key.rpartition("__")
        setattr(header.payload if part else header, field, value)
    return header


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"payload__total_bytes": 10**15}, ProtocolError),
        ({"payload__total_bytes": 31}, ProtocolError),
        ({"payload__layout": b"0" * 16}, ProtocolError),
        ({"payload__digests": b""}, ProtocolError),
        ({"payload__digests": b"0" * 16}, TransferDamagedError),
        ({"payload__inline": b"0" * 31}, ProtocolError),
        ({"payload__inline": b"0" * 33}, ProtocolError),
        ({"content": "code"}, ProtocolError),
        ({"metrics_json": "[1"}, ProtocolError),
        ({"metrics_json": '{"loss": "low"}'}, ProtocolError),
        ({"metrics_json": '{"loss": [1]}'}, ProtocolError),
        ({"num_examples": 0}, UpdateRefusedError),
        ({"round": 2}, ProtocolError),
    ],
    ids=lambda value: str(value)[:50],
)
def test_updates_that_lie_are_refused_and_the_round_goes_on(
    tmp_path: Path, changes: dict[str, Any], error: type[FederationError]
) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        site = sites["site-1"]
        with pytest.raises(error):
            call(bench, "Submit", pb.UpdatePart(update=raw_update(site, GOOD, **changes)).SerializeToString())
        assert site.submit(tasks["site-1"], GOOD) == "used"


def test_an_upload_of_too_many_or_too_few_bytes_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        header = raw_update(sites["site-1"], GOOD)
        header.payload.ClearField("inline")
        first = pb.UpdatePart(update=header).SerializeToString()
        for data in (b"0" * 33, b"0" * 31):
            with pytest.raises((ProtocolError, TransferDamagedError)):
                call(bench, "Submit", first, frames.frame([memoryview(data)]))
        with pytest.raises(ProtocolError):
            call(bench, "Submit", first, first)
        assert sites["site-1"].submit(tasks["site-1"], GOOD) == "used"


def test_a_site_that_was_refused_cannot_bring_its_tensors_in_by_reference(tmp_path: Path) -> None:
    """The server knows its layout by then, but an update may hold the agreed tensors only."""
    with serving(tmp_path, 1, sockets=False, rounds=1) as bench:
        sites, tasks = bench.started(GOOD)
        other = {"a.weight": np.zeros(1, np.float32)}
        with pytest.raises(StateMismatchError):
            sites["site-1"].submit(tasks["site-1"], other)
        back = bench.site("site-1")
        back.join()
        back.register(GOOD)
        header = raw_update(back, other)
        header.payload.ClearField("manifest")
        with pytest.raises((ProtocolError, StateMismatchError)):
            call(bench, "Submit", pb.UpdatePart(update=header).SerializeToString())


@pytest.mark.parametrize("sockets", [True, False])
def test_a_hostile_manifest_does_not_take_the_server_down(tmp_path: Path, sockets: bool) -> None:
    with serving(tmp_path, 1, sockets=sockets, rounds=1) as bench:
        site = bench.site("site-1")
        site.join()
        tensors = [pb.Tensor(name="w", dtype="float32", shape=[0, 2**46, 2**46])]
        request = pb.RegisterRequest(session=pb.Session(attempt=1), manifest=pb.Manifest(tensors=tensors))
        with pytest.raises(ProtocolError):
            call(bench, "Register", request.SerializeToString())
        assert site.register(GOOD) == 1


# -- the errors themselves -----------------------------------------------------------------------------------------

CLASSES = [c for c in vars(all_errors).values() if isinstance(c, type) and issubclass(c, FederationError)]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "copy", [lambda e: pickle.loads(pickle.dumps(e)), lambda e: FederationError.from_wire(e.to_wire())]
)
def test_errors_keep_their_class_and_parts_on_their_way(
    kind: type[FederationError], copy: Callable[[FederationError], FederationError]
) -> None:
    error = copy(kind("what is wrong", where="here", fix="do that"))
    assert type(error) is kind
    assert str(error) == "what is wrong\n  where: here\n  to do: do that"


def test_a_subclass_of_a_script_does_not_replace_its_base() -> None:
    class OwnError(ConfigError):
        pass

    assert type(FederationError.from_wire(ConfigError("x").to_wire())) is ConfigError
    assert OwnError.code == ConfigError.code


def test_every_error_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)
    unknown = FederationError.from_wire({"code": "from-the-future", "what": "x"})
    assert (type(unknown), unknown.what, unknown.fix) == (FederationError, "x", "")


def test_settings_travel_as_json() -> None:
    assert json.loads(json.dumps(asdict(settings(2, keep_local=("a",)))))["keep_local"] == ["a"]
