"""The small files beside a model as they leave a site: read with care, fit for others, as far as the policy allows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from study import Study

from fl_adapters.participant.kit import Kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.results import ModelFiles
from fl_adapters.participant.session import Session
from fl_runtime.types import Arrays

CONFIG = b'{"model_type": "tiny"}'
Shapes: TypeAlias = dict[str, tuple[int, ...]]
SHAPES: Shapes = {"w": (2,)}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north",)) as running:
        running.job(rounds=1, trainings=1)
        yield running


def ended(study: Study, write: Callable[[Path], object], shapes: Shapes = SHAPES, **rules: object) -> Path:
    """Train one round at a site whose export is `write`; return the folder of the server's model."""
    policy = study.kits / "north" / "policy.yml"
    policy.write_text(json.dumps({"share_files": True, **rules}))
    model: Arrays = {"w": np.zeros(2, np.float32)}

    def export(folder: str) -> ModelFiles:
        Path(folder).mkdir(parents=True)
        write(Path(folder))
        return ModelFiles(Path(folder), shapes)

    kit = Kit("job", "north", 0, 1, study.address, "", credentials=str(study.kits / "north"))
    session = Session(kit, Options(), "own", study.transport("north"))
    session.register(model, agreement={}, rounds=None, evaluates=False)
    session.start(lambda: model)
    session.exchange(model, LocalResult(1, 1, {}))
    session.finish(export)
    assert study.server.wait_for_job("job", 30)
    return study.runs / "job" / "model"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "model.safetensors")


def written(**files: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in files.items():
            (folder / name.replace("__", ".")).write_bytes(data)

    return write


def test_what_is_sent_is_said_and_audited(study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    folder = ended(
        study, written(config__json=CONFIG, vocab__txt=b"a\nb\n", train__py=b"import os", notes__txt=b"Mr. X")
    )
    assert files_in(folder) == ["config.json", "vocab.txt"]
    assert "config.json, vocab.txt (26 bytes) went to the server with the model (share_files" in capfd.readouterr().err
    entry = next(line for line in study.log("north") if line["action"] == "files")
    assert entry["sha256"]["config.json"] == hashlib.sha256(CONFIG).hexdigest()
    assert any(line["action"] == "files" and line["site"] == "north" for line in study.log())


def test_links_and_huge_files_stay(study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    secret = study.folder / "secret.json"
    secret.write_bytes(b'{"patient": 1}')

    def write(folder: Path) -> None:
        (folder / "config.json").symlink_to(secret)
        (folder / "generation_config.json").write_bytes(CONFIG)
        (folder / "tokenizer.json").mkdir()
        with (folder / "vocab.json").open("wb") as file:
            file.truncate(49 * 2**20)

    assert files_in(ended(study, write)) == ["generation_config.json"]
    told = capfd.readouterr().err
    for line in ("config.json cannot be sent: it is a link", "vocab.json cannot be sent: it has 51380224 bytes"):
        assert f"{line}" in told


def test_paths_of_the_site_and_names_of_code_do_not_leave(study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    config = {
        "_name_or_path": "/home/clinic/models/tiny",
        "nested": {"vocab_file": "C:\\clinic\\vocab.txt"},
        "hub": {"name_or_path": "google/tiny"},
        "auto_map": {"AutoModel": "modeling.Tiny"},
    }
    folder = ended(study, written(config__json=json.dumps(config).encode()))
    assert json.loads((folder / "config.json").read_text()) == {
        "_name_or_path": "tiny",
        "nested": {"vocab_file": "vocab.txt"},
        "hub": {"name_or_path": "google/tiny"},
    }
    assert "config.json goes without its entry auto_map" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rules", "sent", "says"),
    [
        ({"share_files": False}, [], "config.json, vocab.txt stay at this site (no share_files: true in policy.yml)"),
        (
            {"share_files": ["conf*"]},
            ["config.json"],
            "vocab.txt stay at this site (share_files: [conf*] in policy.yml)",
        ),
        ({"names": False}, [], "stay at this site (names: false in policy.yml)"),
        ({"max_round_bytes": 25}, [], "stay at this site (max_round_bytes: 25 in policy.yml)"),
    ],
    ids=str,
)
def test_the_policy_decides(
    study: Study, capfd: pytest.CaptureFixture[str], rules: dict[str, object], sent: list[str], says: str
) -> None:
    assert files_in(ended(study, written(config__json=CONFIG, vocab__txt=b"a\nb\n"), **rules)) == sent
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("shapes", [{"w": (2,), "frozen": (3,)}, {"w": (4,)}], ids=["one more", "another shape"])
def test_a_model_that_the_server_has_in_part_gets_no_files(
    study: Study, capfd: pytest.CaptureFixture[str], shapes: Shapes
) -> None:
    assert files_in(ended(study, written(config__json=CONFIG), shapes)) == []
    assert "tensors that do not travel (" in capfd.readouterr().err
