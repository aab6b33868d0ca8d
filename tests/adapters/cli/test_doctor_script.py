"""`fl-adapters doctor SCRIPT`: what it finds in scripts, which it never runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_adapters.cli.app import app
from fl_adapters.cli.doctor.script_checks import missing_adapter, script_checks
from fl_adapters.cli.scripts.new import FRAMEWORKS, write

ROOT = Path(__file__).resolve().parents[3]

PLAIN = """
raise SystemExit("this script must not run")
import pandas as pd
from transformers import Trainer, TrainingArguments

table = pd.read_csv("/home/ann/train.csv")
for fold in range(3):
    trainer = Trainer(model, TrainingArguments("out", deepspeed="ds.json", fsdp=""), train_dataset=table)
    trainer.train()
"""


def found(folder: Path, text: str) -> dict[str, tuple[str, str, str]]:
    script = folder / "train.py"
    script.write_text(text)
    return {check.name: (check.status, check.detail, check.fix) for check in script_checks(script)}


def test_a_plain_script_is_told_what_it_lacks(tmp_path: Path) -> None:
    checks = found(tmp_path, PLAIN)
    assert {name: check[0] for name, check in checks.items()} == {
        "adapter": "problem",
        "data": "note",
        "trainings": "note",
        "paths": "note",
        "refused": "problem",
    }
    assert "fl_adapters.hf import FederatedCallback" in checks["adapter"][2]
    assert "site().data" in checks["data"][2]
    assert checks["trainings"][1].endswith("line 9 in a loop")
    assert "line 6 '/home/ann/train.csv'" in checks["paths"][1]
    assert checks["refused"][1].startswith("line 8: deepspeed")


@pytest.mark.parametrize(
    ("text", "adapter", "trainings"),
    [
        ("import xgboost\nxgboost.train({}, d)", "problem", "ok"),
        ("from fl_adapters.xgboost import train\nimport xgboost\ntrain({}, d)\ntrain({}, e)", "ok", "note"),
        ("import torch\nfrom sklearn.metrics import f1_score\nmodel.train()\nmodel.train(True)", "problem", "ok"),
        ("import keras\nmodel.fit(x, y)\nmodel.fit(x, y)", "problem", "note"),
        ("import fl_adapters as fl\nwith fl.connect() as site:\n    pass", "ok", "ok"),
        ("import numpy", "problem", "ok"),
    ],
)
def test_adapters_and_trainings(tmp_path: Path, text: str, adapter: str, trainings: str) -> None:
    checks = found(tmp_path, text)
    assert (checks["adapter"][0], checks["trainings"][0]) == (adapter, trainings)


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("from transformers import Trainer", True),
        ("from transformers import Trainer\nimport fl_adapters\nfl_adapters.site()", True),
        ("from transformers import Trainer\nfrom fl_adapters.hf import FederatedCallback", False),
        ("from transformers import Trainer\nfrom ours import callbacks", False),  # ours.py lies beside the script
        ("from transformers import Trainer\nfrom . import callbacks", False),
        ("def train(:", False),
    ],
)
def test_a_script_trains_alone_only_if_that_can_be_read_from_it(tmp_path: Path, text: str, alone: bool) -> None:
    (tmp_path / "ours.py").touch()
    (tmp_path / "train.py").write_text(text)
    assert (missing_adapter(tmp_path / "train.py") is not None) == alone
    assert missing_adapter(tmp_path / "none.py") is None


@pytest.mark.parametrize("line", ['Trainer(strategy="fsdp_native")', 'Trainer(strategy="deepspeed_stage_2")'])
def test_sharded_strategies_of_lightning_are_refused(tmp_path: Path, line: str) -> None:
    assert found(tmp_path, f"from lightning import Trainer\n{line}")["refused"][0] == "problem"
    assert "refused" not in found(tmp_path, 'from lightning import Trainer\nTrainer(strategy="ddp")')


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_nothing_is_wrong_with_a_template(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    assert {check.status for check in script_checks(tmp_path / "train.py")} == {"ok"}


@pytest.mark.parametrize("folder", ["hf", "lightning", "keras", "xgboost", "torch"])
def test_of_the_examples_the_federated_ones_have_no_problem_and_the_others_lack_the_line(folder: str) -> None:
    scripts = sorted((ROOT / "examples" / folder).rglob("train*.py"))
    assert len(scripts) > 1
    for script in scripts:
        status = {check.name: check.status for check in script_checks(script)}["adapter"]
        assert status == ("ok" if "federated" in script.stem else "problem"), script


def test_what_is_no_script_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app(["doctor", str(tmp_path / "none.py"), "--json"], prog_name="fl-adapters")
    assert end.value.code == 1
    (check,) = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert "No such file" in check["detail"]
    checks = found(tmp_path, "def train(:\n")
    assert "line 1" in checks["script"][1]
    (tmp_path / "train.py").write_bytes(b"\x00\xff")
    assert next(script_checks(tmp_path / "train.py")).status == "problem"


@pytest.mark.parametrize(
    ("text", "said", "counts"),
    [
        (PLAIN, '2 problems to mend first, and 3 notes to read: see the column "to do"', (2, 3)),
        (
            "from fl_adapters.xgboost import train\ntrain({}, d)",
            "no problem, and 1 note: nothing fails, but read",
            (0, 1),
        ),
        ("import fl_adapters as fl\nfl.connect(fl.site().data)", "no problem and no note in 3 checks", (0, 0)),
    ],
)
def test_the_last_line_counts_problems_and_notes(
    text: str, said: str, counts: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        app(["doctor", str(tmp_path / "train.py"), "--json"], prog_name="fl-adapters")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert said in " ".join(err.split())
    assert (found["problems"], found["notes"], found["ok"]) == (*counts, end.value.code == 0)
