"""Makes the helpers beside the tests, and those of the runtime's tests, importable; a provisioned federation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "runtime")]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Any]:
    """A federation of two sites with its server running, in this process."""
    with import_module("study").Study(tmp_path) as study:
        yield study
