"""Each test process has one backend of Keras: $KERAS_BACKEND, PyTorch by default."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

if not find_spec("keras"):
    collect_ignore_glob = ["test_*"]
else:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["OMP_NUM_THREADS"] = "1"
    # The tests make the same small program again and again: JAX compiles it once.
    _cache = tempfile.TemporaryDirectory(prefix="fl-adapters-jax-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, outside any federation but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
