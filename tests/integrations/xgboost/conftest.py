"""Tests of the XGBoost adapter: each in a folder of its own, one thread per site."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if not find_spec("xgboost"):
    collect_ignore_glob = ["test_*"]
else:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, and in no federation but that which it makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
