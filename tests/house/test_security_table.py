"""docs/security.md names files and tests that exist, and a test for every promise."""

from __future__ import annotations

import ast
import re

import pytest
from source_tree import ROOT

_ROW = re.compile(r"\| (?P<promise>[^|`]+) \| (?P<files>`fl_[^|]+) \| (?P<tests>`tests/[^|]+) \|")
_CODE = re.compile(r"`([^`]+)`")
PROMISES = [
    (row["promise"], _CODE.findall(row["files"]), _CODE.findall(row["tests"]))
    for row in _ROW.finditer((ROOT / "docs/security.md").read_text("utf-8"))
]


def functions(path: str) -> set[str]:
    """Return the names of a file's functions."""
    return {
        node.name for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(("files", "tests"), [row[1:] for row in PROMISES], ids=[row[0] for row in PROMISES])
def test_a_promise_has_files_that_enforce_it_and_tests_that_attack_it(files: list[str], tests: list[str]) -> None:
    assert files and tests
    missing = [file for file in files if not (ROOT / file).exists()]
    for test in tests:
        path, _, name = test.partition("::")
        if not (ROOT / path).is_file() or name not in functions(path):
            missing.append(test)
    assert not missing, f"docs/security.md names what does not exist: {missing}"


def test_every_row_of_the_table_is_read() -> None:
    text = (ROOT / "docs/security.md").read_text("utf-8").partition("| promise |")[2]
    assert len(PROMISES) == text.count("\n| ") >= 30
