"""The other backends: Keras takes one for the life of a process, so each gets a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
ON_EACH = ("test_keras_conformance.py", "test_keras_exchange.py")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in ("tensorflow", "torch", "jax") if b != keras.backend.backend()])
def test_the_suite_on_another_backend(backend: str) -> None:
    if not find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    found_at = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in ON_EACH)],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": found_at},
        capture_output=True,
        text=True,
        cwd=HERE.parents[2],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_mirrored_strategy() -> None:
    if not find_spec("tensorflow"):
        pytest.skip("tensorflow is not installed")
    found_at = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, str(HERE / "run_mirrored.py")],
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": found_at},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
