"""The small files beside a final model: hostile ones are refused, and which go with the model depends on no order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, started
from study import Study, readdressed

from fl_adapters.cli.app import app
from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Arrays
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.model_files import MODEL_FILES, check_contents

W: Arrays = {"w": np.zeros(4, np.float32)}
CONFIG = b'{"model_type": "bert", "id2label": {"0": "benign"}}'
FILES = {"config.json": CONFIG, "vocab.txt": "[PAD]\nKrebs\n癌\n".encode()}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north", "south", "west")) as running:
        yield running


def at_the_end(study: Study) -> list[Site]:
    """Run a job of one round; return its sites, each with the final model and not gone yet."""
    study.job(rounds=1)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    for site in sites:
        site.submit(tasks[site.name], {"w": tasks[site.name].arrays["w"] + np.float32(1)})
    for site in sites:
        assert site.client.next_task().kind == "final"
    return sites


def results(study: Study, sites: list[Site]) -> Path:
    """Let all sites leave; return the folder of the model."""
    for site in sites:
        site.client.leave("done", early=False)
    assert study.server.wait_for_job("job", 30)
    return study.runs / "job" / "model"


def header(site: Site, files: dict[str, Any], **changed: Any) -> bytes:
    """The first message of the call, whatever the client would say about the files."""
    arrays = {name: np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data for name, data in files.items()}
    manifest = Manifest.of(arrays)
    fields = {
        "session": pb.Session(job="job", attempt=site.welcome.attempt),
        "payload": frames.describe(manifest, manifest.digests(arrays, {}), known=False),
        **changed,
    }
    return pb.FilesPart(files=pb.FilesHeader(**fields)).SerializeToString()


def refused(call: Callable[[], Any]) -> FederationError:
    with pytest.raises(FederationError) as caught:
        call()
    return caught.value


def test_no_other_file_is_taken(study: Study) -> None:
    sites = at_the_end(study)
    for name in (
        "../config.json",
        "/etc/cron.d/job",
        "modeling.py",
        "pytorch_model.bin",
        "model.safetensors",
        "a/b",
        "x",
    ):
        error = refused(lambda name=name: sites[0].client.send_files({"config.json": CONFIG, name: b"{}"}))
        assert isinstance(error, ProtocolError)
        assert f"{name!r} cannot go with the model" in error.what
    assert sorted(path.name for path in results(study, sites).iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("config.json", b"{", "Expecting property name"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"[" * 100 + b"]" * 100, "nested"),
        ("config.json", b'{"auto_map": {"AutoModel": "evil/model--code.Model"}}', "makes a framework load code"),
        ("config.json", b'{"text_config": [{"_attn_implementation": "evil/kernel"}]}', "makes a framework load code"),
        ("adapter_config.json", b'{"auto_mapping": {"parent_library": "evil"}}', "makes a framework load code"),
        ("tokenizer.json", b"\xff\xfe", "can't decode"),
        ("vocab.txt", b"a\n\x1b[2J\n", "control character"),
        ("merges.txt", b"\x80\x04\x95", "can't decode"),
        ("spiece.model", b"\x80\x04\x95\x10\x00", "spiece.model cannot go"),
        ("tokenizer.model", b"PK\x03\x04", "tokenizer.model cannot go"),
    ],
    ids=str,
)
def test_contents_are_what_their_names_say(name: str, data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says.replace("[", r"\[")):
        check_contents(name, data)


def test_words_of_any_script_and_sentence_pieces_are_taken() -> None:
    check_contents("vocab.txt", FILES["vocab.txt"] + "\u200e\u3000\ue000\n".encode())
    check_contents("adapter_config.json", b'{"auto_mapping": null, "megatron_core": "megatron.core"}')
    piece = b"\x0a\x03\xe2\x96\x81" + b"\x15\x00\x00\x80\xbf"  # text and score of one piece
    check_contents("spiece.model", b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x01")


def test_the_server_checks_by_itself(study: Study) -> None:
    """Nothing that a site announces or sends is believed."""
    north, *_ = sites = at_the_end(study)

    def send(*messages: bytes) -> Callable[[], Any]:
        return lambda: list(north.transport.call("Files", iter(messages)))

    large = {"vocab.json": np.broadcast_to(np.uint8(0), 49 * 2**20)}
    many = {f"config.json{n}": b"{}" for n in range(25)}
    for files, says in [
        (large, "the limit is"),
        (many, "25 files"),
        ({"config.json": np.zeros(2, np.float32)}, "bytes"),
    ]:
        assert says in refused(send(header(north, files))).what
    assert "reads weights" in refused(send(header(north, FILES, weights_file="../x.safetensors"))).what
    code = b'{"auto_map": {"AutoModel": "evil/model--code.Model"}}'
    assert "load code" in refused(send(header(north, {"config.json": code}), frames.frame([memoryview(code)]))).what
    other = frames.frame([memoryview(b" " * len(CONFIG))])
    assert "damaged" in refused(send(header(north, {"config.json": CONFIG}), other)).what
    assert north.client.send_files(FILES).status == "kept"  # it can still do better
    assert json.loads((results(study, sites) / "config.json").read_bytes()) == json.loads(CONFIG)


def test_files_come_after_the_last_round_and_from_the_job_s_sites_alone(study: Study) -> None:
    study.job(rounds=1)
    sites = [study.site(name) for name in study.sites]
    tasks = started(sites, W)
    assert "last round is not over" in refused(lambda: sites[0].client.send_files(FILES)).what
    for site in sites:
        site.submit(tasks[site.name], tasks[site.name].arrays)
    for site in sites:
        site.client.next_task()
    sites[0].client.leave("done", early=False)
    assert "has left this run" in refused(lambda: sites[0].client.send_files(FILES)).what
    message = header(sites[1], FILES)
    error = refused(lambda: list(study.transport("lena").call("Files", iter([message]))))
    assert error.code == "permission-denied"
    results(study, sites[1:])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_first_site_of_the_job_wins_whoever_sends_first_and_others_are_named(
    study: Study, order: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    sites, vocabulary = at_the_end(study), {"vocab.txt": b"other\n"}
    files = [FILES, {**FILES, **vocabulary}, FILES]
    for index in order:
        assert sites[index].client.send_files(files[index]) is not None
    folder = results(study, sites)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert read_tensors(folder / "model.safetensors")["w"].tolist() == [1, 1, 1, 1]
    kept = study.server.outcome("job")["files"]
    assert kept == {"site": "north", "names": list(FILES), "different": {"south": ["vocab.txt"]}}
    events = [json.loads(line) for line in (study.runs / "job" / "events.jsonl").read_text().splitlines()]
    told = [event["data"]["text"] for event in events if event["kind"] == "warning" and event["site"] == "south"]
    assert len(told) == 1
    assert "south has another vocab.txt than north" in told[0]
    with pytest.raises(SystemExit):
        app(["job", "show", "job", "--kit", str(readdressed(study, "ada"))])
    assert "warning: south sent another vocab.txt" in capfd.readouterr().out
    listed = {item["path"]: item["sha256"] for item in study.admin().ask("ShowJob", job="job")["files"]}
    assert listed.keys() >= {"model/config.json", "model/vocab.txt", "model/model.safetensors"}


def test_a_killed_server_still_has_the_files(study: Study) -> None:
    """They are acknowledged, so they are there; sending them again changes nothing."""
    sites = at_the_end(study)
    assert sites[1].client.send_files(FILES, "adapter_model.safetensors").status == "kept"
    study.server.close()
    study.start()
    again = [study.site(name) for name in study.sites]
    for site in again:
        site.join()
        site.register(W)
        assert site.client.next_task().kind == "final"
    assert again[1].client.send_files(FILES).status == "kept"
    assert again[2].client.send_files(FILES).status == "same"
    folder = results(study, again)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert read_tensors(folder / "adapter_model.safetensors")["w"].tolist() == [1, 1, 1, 1]


def test_an_older_server_is_sent_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_runtime.server.calls import service

    monkeypatch.setattr(service, "FEATURE_NAMES", ("beats", "parts", "trainings", "cohort"))
    sites = at_the_end(study)
    assert sites[0].client.send_files(FILES) is None
    assert sorted(path.name for path in results(study, sites).iterdir()) == ["model.safetensors"]


def test_nothing_that_may_travel_can_run() -> None:
    assert {Path(name).suffix for name in MODEL_FILES} == {".json", ".txt", ".jinja", ".model", ".spm"}
    assert all(Path(name).name == name for name in MODEL_FILES)
