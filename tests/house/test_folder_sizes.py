"""Limits on the size of folders and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, SOURCES, shown

MAX_ENTRIES = 16
MAX_TOP_ENTRIES = 10
MAX_LINES = 500


def entries(folder: Path) -> list[str]:
    """Return the modules and packages in a folder; __init__.py, py.typed and generated files do not count."""
    files = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    return sorted(files + [path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))])


def folders() -> Iterator[Path]:
    for package in PACKAGES:
        yield ROOT / package
        yield from sorted(path for path in (ROOT / package).rglob("*") if path.is_dir() and any(path.glob("*.py")))


@pytest.mark.parametrize("folder", list(folders()), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_can_be_overlooked(folder: Path) -> None:
    most = MAX_TOP_ENTRIES if folder == ROOT / "fl_adapters" else MAX_ENTRIES
    found = entries(folder)
    fault = (
        f"{shown(folder)} has {len(found)} entries, the limit is {most}; give a subject a folder of its own: {found}"
    )
    assert len(found) <= most, fault


def test_no_file_is_longer_than_a_subject() -> None:
    lengths = {shown(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES.values()}
    faults = [
        f"{name} has {lines} lines, the limit is {MAX_LINES}; move a subject of its own into another file"
        for name, lines in lengths.items()
        if lines > MAX_LINES
    ]
    assert not faults, "\n".join(faults)
