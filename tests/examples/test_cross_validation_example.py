"""The cross-validation example as its README says: every fold is a federated training of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xgboost")
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cross_validation"


def test_every_fold_is_a_training_of_its_own(tmp_path: Path) -> None:
    script = str(EXAMPLE / "train_federated.py")
    command = [sys.executable, "-m", "fl_adapters.cli", "simulate", script, "--sites", "2", "--json"]
    done = subprocess.run([*command, "--folder", str(tmp_path), "--", "--folds", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    run = Path(result["folder"])
    assert [item["folder"] for item in result["trainings"]] == [str(run), str(run / "2"), str(run / "3")]
    assert all(item["rounds"] == 20 and Path(item["model"]).is_dir() for item in result["trainings"])
    assert result["rounds"] == 20 and result["model"] == result["trainings"][0]["model"]
    for site in ("site-1", "site-2"):
        log = (run / "sites" / site / "log.txt").read_text()
        scores = [float(text) for text in log.rpartition("curve:")[2].split()]
        assert len(scores) == 3 and min(scores) > 0.9
