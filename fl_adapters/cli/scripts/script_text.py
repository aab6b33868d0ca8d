"""The text of a script: what its names stand for, and changes at places of its syntax tree. It is not run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Edit(NamedTuple):
    """Text that takes the place of characters from `start` to `end`."""

    start: int
    end: int
    text: str


class ScriptText:
    """A Python script.

    Args:
        source: Its text.

    Attributes:
        tree: Its syntax tree.
        origins: Name in the script -> what it was imported as, such as "transformers.Trainer".

    Raises:
        SyntaxError: The text is not Python.
        ValueError: Likewise, because of a null byte.
    """

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self._source = source
        self._lines = re.findall(r".*?(?:\r\n|\n|\r|$)", source)  # as Python counts lines
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self.origins = dict(self._imports())

    def _imports(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    yield (alias.asname, alias.name) if alias.asname else (top, top)
            elif isinstance(node, ast.ImportFrom):
                yield from ((alias.asname or alias.name, f"{node.module or ''}.{alias.name}") for alias in node.names)

    def origin(self, node: ast.expr) -> str:
        """Return what an expression was imported as, such as "xgboost.train" for `xgb.train`; "" if it was not."""
        if isinstance(node, ast.Name):
            return self.origins.get(node.id, "")
        if isinstance(node, ast.Attribute) and (inside := self.origin(node.value)):
            return f"{inside}.{node.attr}"
        return ""

    def changed(self, edits: Sequence[Edit]) -> str:
        """Return the text with edits, of which no two overlap. Those at one place follow each other in this order."""
        text = self._source
        for edit in sorted(edits, key=lambda edit: edit.start)[::-1]:
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def instead(self, node: ast.expr, text: str) -> Edit:
        """Put a text in place of an expression."""
        return Edit(self._start(node), self._end(node), text)

    def before(self, node: ast.expr, text: str) -> Edit:
        """Put a text before an expression."""
        return Edit(self._start(node), self._start(node), text)

    def after(self, node: ast.expr, text: str) -> Edit:
        """Put a text after an expression."""
        return Edit(self._end(node), self._end(node), text)

    def below_imports(self, line: str) -> Edit:
        """Put a line below the imports at the top of the script, or below its docstring."""
        body = self.tree.body
        said = [node for node in body[:1] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        last = (imports or said)[-1:]
        return self._line_below(last[0].end_lineno or 0 if last else 0, line)

    def with_argument(self, call: ast.Call, argument: str) -> Iterator[Edit]:
        """Put an argument at the end of a call: in a line of its own where the last one has one."""
        close, given = self._end(call) - 1, [*call.args, *(word.value for word in call.keywords)]
        if not given:
            yield Edit(close, close, argument)
            return
        last = max(given, key=self._end)
        end = self._end(last)
        while parenthesis := re.match(r"\s*\)", self._source[end:close]):  # the argument stands in parentheses
            end += parenthesis.end()
        comma = re.match(r"\s*,", self._source[end:close])
        if call.end_lineno == last.end_lineno:
            yield (
                Edit(end + comma.end(), end + comma.end(), f" {argument}") if comma else Edit(end, end, f", {argument}")
            )
            return
        if not comma:
            yield Edit(end, end, ",")
        line = self._lines[(last.end_lineno or 1) - 1]
        yield self._line_below(last.end_lineno or 0, f"{line[: len(line) - len(line.lstrip())]}{argument},")

    def _start(self, node: ast.expr) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, line: int, column: int) -> int:
        """The number of characters before a place, whose column counts bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _line_below(self, line: int, text: str) -> Edit:
        at = self._starts[line]
        whole = at == 0 or self._source[at - 1] in "\r\n"
        newline = "\r\n" if "\r\n" in self._source else "\n"
        return Edit(at, at, f"{text}{newline}" if whole else f"{newline}{text}")
