"""What the demos print at their end."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

FILE = Path(__file__).resolve().parents[2] / "examples" / "comparison.py"


@pytest.fixture(scope="module")
def comparison() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("comparison_of_examples", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_at_80_columns_no_folder_is_cut_off(comparison: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "runs" / f"train_federated-{'1' * 40}"
    folders = {"site-1 alone": run / "comparison" / "site-1-alone", "federated": run / "model", "central": run / "c"}
    scores = [
        comparison.Score(name, 9000, 0.5 + 0.1 * (at > 0), folder) for at, (name, folder) in enumerate(folders.items())
    ]
    out = io.StringIO()
    comparison.show(scores, "accuracy", "accuracy", Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert any("comparison/site-1-alone/ " in line for line in lines)
    assert all(len(line) <= 80 for line in lines if run.name not in line)
    assert any(run.name in line for line in lines)  # whole, to be copied


@pytest.mark.parametrize(
    ("federated", "said"),
    [(0.8, ""), (0.72, "scores 0.720, not above site-2 alone (0.740)"), (0.75, "more than 0.02 below central (0.800)")],
)
def test_the_end_says_what_the_federation_falls_short_of(comparison: ModuleType, federated: float, said: str) -> None:
    scores = {"site-1 alone": 0.6, "site-2 alone": 0.74, "federated": federated, "central": 0.8}
    assert said in comparison.shortfall(scores)
    assert (not comparison.shortfall(scores)) == (not said)
