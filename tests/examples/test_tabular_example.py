"""The tabular example on real data with five uneven sites: its federated pipeline beside the central one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xgboost")
pytest.importorskip("cryptography")
if sys.platform != "linux":
    pytest.skip("histogram mode needs loopback addresses that are Linux's", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "tabular"


def scores(folder: Path, *command: str) -> Any:
    """Run a script of the example, and return the scores that it saves."""
    file = folder / f"{len(list(folder.iterdir()))}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, "--scores", str(file)], cwd=folder, env=environment)
    assert done.returncode == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_scores_equal_those_of_all_rows_in_one_place(shared_data: Path, tmp_path: Path) -> None:
    given = ["--data", str(shared_data / "adult")]
    central = scores(tmp_path, str(FOLDER / "train.py"), *given)
    simulate = ["-m", "fl_adapters", "simulate", str(FOLDER / "train_federated.py"), "--sites", "5", "--"]
    federated = scores(tmp_path, *simulate, *given)
    for model in ("logistic", "trees"):
        assert abs(federated[model] - central[model]) < 0.001
