"""Code, pages and tests have no misspelt word that codespell knows. Its settings are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("codespell_lib", reason="codespell is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_no_word_is_misspelt() -> None:
    done = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_word_is_found(tmp_path: Path) -> None:
    word = "rec" + "ieved"  # in two parts, since this file is checked, too
    (tmp_path / "page.md").write_text(f"The {word} model.\n")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), "page.md"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "received" in done.stdout
