"""Fixtures for XGBoost: a folder for each test, one thread for each site."""

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
    """Run each test in its own folder, outside any federation but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
