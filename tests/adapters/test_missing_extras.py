"""What the adapters say if a package that they need is not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import {module}
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("extra", "blocked"),
    [
        ("hf", ["transformers"]),
        ("hf", ["torch"]),
        ("hf", ["safetensors"]),
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("lightning", ["torch"]),
        ("keras", ["keras"]),
        ("keras", ["tensorflow", "torch", "jax"]),
        ("xgboost", ["xgboost"]),
        ("monai", ["ignite"]),
        ("monai", ["monai"]),
    ],
)
def test_a_missing_package_comes_with_the_extra_to_install(extra: str, blocked: list[str]) -> None:
    if extra != "hf" and find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed, so only its absence could be tested")
    code = BLOCKED.format(blocked=set(blocked), module=f"fl_adapters.{extra}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ImportError "), done.stdout + done.stderr
    assert f"is missing: pip install 'fl-adapters[{extra}]'" in done.stdout
