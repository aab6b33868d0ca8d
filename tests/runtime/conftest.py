"""Fixtures shared by the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Any]:
    """A federation of two sites with its server running in this process."""
    with import_module("study").Study(tmp_path) as study:
        yield study
