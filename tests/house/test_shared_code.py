"""No code stands in two integrations: what two of them need belongs to fl_adapters."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Sequence

from source_tree import INTEGRATIONS, ROOT, bare_text, python_files, shown

RUN = 6
_PASSED_ON = re.compile(r"(\w+)=\1,")
Line = tuple[int, str]
"""A line's number and its text, white space normalised."""


def code_lines(text: str) -> list[Line]:
    """Return the lines that count: no blanks, comments, imports, docstrings or lines of punctuation alone.

    Nor do the lines of a signature, and `kit=kit,` in a call: the arguments that all adapters share are users'
    contract, so every constructor names, documents and passes on the same ones.
    """
    dropped = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom) or bare_text(node) is not None:
            dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            dropped |= set(range(node.lineno + 1, node.body[0].lineno))
    lines = ["" if _PASSED_ON.fullmatch(line.strip()) else line for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    numbered = ((number, " ".join(line.split())) for number, line in enumerate(lines, 1) if number not in dropped)
    return [(number, line) for number, line in numbered if any(map(str.isalnum, line))]


def shared_runs(left: Sequence[Line], right: Sequence[Line], least: int = RUN) -> list[tuple[int, int, int]]:
    """Return first line here, first line there and length of each run of at least `least` equal lines."""
    starts: dict[tuple[str, ...], list[int]] = {}
    for at in range(len(right) - least + 1):
        starts.setdefault(tuple(line for _, line in right[at : at + least]), []).append(at)
    found, covered = list[tuple[int, int, int]](), set[tuple[int, int]]()
    for here in range(len(left) - least + 1):
        for there in starts.get(tuple(line for _, line in left[here : here + least]), ()):
            if (here, there) in covered:
                continue
            pairs = zip(left[here:], right[there:], strict=False)
            length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][1] == pair[1][1], pairs))
            covered |= {(here + step, there + step) for step in range(length)}
            found.append((left[here][0], right[there][0], length))
    return found


def test_integrations_share_no_run_of_lines() -> None:
    lines = {path: code_lines(path.read_text("utf-8")) for path in python_files("integrations")}
    owner = {path: path.relative_to(ROOT / "integrations").parts[0] for path in lines}
    faults = [
        f"{shown(here, line)} and {shown(there, other)} share {length} lines; write them once in fl_adapters"
        for here, there in itertools.combinations(lines, 2)
        if owner[here] != owner[there] and {owner[here], owner[there]} <= INTEGRATIONS
        for line, other, length in shared_runs(lines[here], lines[there])
    ]
    assert not faults, "\n".join(faults)


def test_a_shared_run_is_found_whatever_stands_between() -> None:
    body = [f"x{number} = {number}" for number in range(7)]
    one = "import a\n" + "\n".join(body)
    other = '"""Docstring."""\n\n' + "\n\n# comment\n".join(f"{line}  # why" for line in body)
    assert shared_runs(code_lines(one), code_lines(other)) == [(2, 3, 7)]
    assert not shared_runs(code_lines(one), code_lines("\n".join(body[:5])))


def test_signatures_and_passed_arguments_do_not_count() -> None:
    text = "def f(\n    kit=None,\n    every=1,\n):\n    return Options(\n        kit=kit,\n        every=2,\n    )"
    assert code_lines(text) == [(1, "def f("), (5, "return Options("), (7, "every=2,")]
