"""`fl-adapters new --from SCRIPT`: the lines that it adds, where it adds them, and that it asks before it writes."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from fl_adapters.cli.app import app
from fl_adapters.cli.scripts.joining import joined
from fl_adapters.cli.scripts.twins import TWINS
from fl_runtime.errors import ConfigError

HF = '''"""Trains."""
from transformers import Trainer, TrainingArguments

trainer = Trainer(
    model=model,
    args=TrainingArguments("out"),  # the usual, ones
    compute_metrics=accuracy
)
trainer.train()
'''


def new(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app(["new", *words], prog_name="fl-adapters")
    return int(end.value.code or 0), *capsys.readouterr()


def added(text: str) -> list[str]:
    """The lines of the new script that the old one does not have."""
    before, after = text.splitlines(), joined(text, "train.py").splitlines()
    ast.parse("\n".join(after))
    return [line for line in after if line not in before]


def test_a_script_gets_its_callback_and_nothing_else_changes() -> None:
    assert joined(HF, "train.py") == HF.replace(
        "TrainingArguments\n\n", "TrainingArguments\nfrom fl_adapters.hf import FederatedCallback\n\n"
    ).replace("=accuracy\n", "=accuracy,\n    callbacks=[FederatedCallback()],\n")
    assert joined(HF.replace("\n", "\r\n"), "train.py") == joined(HF, "train.py").replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import transformers as hf\nt = hf.Trainer(m, a)", ["t = hf.Trainer(m, a, callbacks=[FederatedCallback()])"]),
        (
            "from trl import SFTTrainer\nclass Own(SFTTrainer):\n    x = 1\nt = Own(é, args=(a),)",
            ["t = Own(é, args=(a), callbacks=[FederatedCallback()])"],
        ),
        (
            "import lightning as L\nt = L.Trainer(callbacks=[\n    Stop(),\n])",
            ["    Stop(), FederatedCallback(),"],
        ),
        (
            "from pytorch_lightning import Trainer\nt = Trainer(callbacks=own)\nu = Trainer()",
            ["t = Trainer(callbacks=[*own, FederatedCallback()])", "u = Trainer(callbacks=[FederatedCallback()])"],
        ),
        (
            "from tensorflow import keras\nscaler.fit(x)\nm.fit(x, y, epochs=2, callbacks=None)",
            ["m.fit(x, y, epochs=2, callbacks=[FederatedCallback()])"],
        ),
        (
            "from monai.engines import SupervisedTrainer\nt = SupervisedTrainer(d, train_handlers=[])",
            ["t = SupervisedTrainer(d, train_handlers=[FederatedHandler()])"],
        ),
        (
            "import fl_adapters, keras\nmodel.fit(read(fl_adapters.site().data))",
            ["model.fit(read(fl_adapters.site().data), callbacks=[FederatedCallback()])"],
        ),
        (
            "import xgboost as xgb\nb = xgb.train(p, d)",
            ["import fl_adapters.xgboost", "b = fl_adapters.xgboost.train(p, d)"],
        ),
        (
            "from sklearn.linear_model import Ridge\nfrom sklearn.svm import SVC\nfrom xgboost import XGBRegressor as X"
            "\nRidge().fit(x, y)\nX().fit(x, y)",
            [
                "from fl_adapters.sklearn import Ridge",
                "from fl_adapters.xgboost import FederatedXGBRegressor as X",
            ],
        ),
    ],
)
def test_each_framework_gets_its_lines(text: str, lines: list[str]) -> None:
    found = [line for line in added(text) if not line.endswith(("import FederatedCallback", "import FederatedHandler"))]
    assert sorted(found) == sorted(lines)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import torch\nfor step in range(3):\n    pass", "no trainer of a framework"),
        ("from fl_adapters.hf import FederatedCallback", "takes part in federations already"),
        ("import fl_adapters.hf as fed\nfed.FederatedCallback()", "takes part in federations already"),
        ("import fl_adapters\nwith fl_adapters.connect() as site: pass", "takes part in federations already"),
        ("import fl_adapters as fl\nwith fl.sums() as total: pass", "takes part in federations already"),
        ("from keras import Model\nm.fit(x, callbacks=made())", "callbacks= is no list in line 2"),
        ("def (", "is not Python"),
    ],
)
def test_what_cannot_be_joined_is_said(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        joined(text, "train.py")
    assert caught.value.fix


def test_it_writes_only_if_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(HF)
    script.chmod(0o750)
    status, out, _ = new(capsys, "--from", str(script))  # nobody can be asked here
    assert (status, script.read_text()) == (0, HF)
    assert "+    callbacks=[FederatedCallback()]," in out.splitlines()
    status, out, _ = new(capsys, "--from", str(script), "--yes", "--json")
    assert (status, json.loads(out.splitlines()[-1])["written"]) == (0, True)
    assert script.read_text() == joined(HF, "train.py")
    assert os.stat(script).st_mode & 0o777 == 0o750
    status, _, err = new(capsys, "--from", str(script))
    assert status == 1 and "takes part in federations already" in err
    status, _, err = new(capsys)
    assert status == 1 and "--from SCRIPT.py" in err


def test_names_in_place_of_others_are_there() -> None:
    sklearn, xgboost = pytest.importorskip("fl_adapters.sklearn"), pytest.importorskip("fl_adapters.xgboost")
    assert set(TWINS["sklearn"].values()) == set(sklearn.__all__) - {"as_sklearn", "over"}
    assert set(TWINS["xgboost"].values()) == set(xgboost.__all__) - {"FederatedCallback"}
