"""Private attributes of a framework are touched only in that integration's trainer.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from source_tree import python_files, shown, tree_of

# Documented names of Python's own that begin with an underscore.
DOCUMENTED = {"os._exit", "sys._getframe"}

_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines: functions, classes, variables and fields of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr


def is_own(node: ast.expr) -> bool:
    """Return whether an expression is this object or this class: `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_accesses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and expression of each access to a private name that the file does not define itself.

    Such as `x._y`, `getattr(x, "_y")` and `from x import _y`. What a subclass does with `self._y` is not seen: the
    name may be its own.
    """
    ours = set(own_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            expression = ast.unparse(node)
            foreign = is_private(node.attr) and node.attr not in ours and not is_own(node.value)
            if foreign and expression not in DOCUMENTED:
                yield node.lineno, expression
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _BY_NAME and len(node.args) > 1:
            target, name = node.args[0], node.args[1]
            text = name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
            if is_private(text) and text not in ours and not is_own(target):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            private = any(map(is_private, [*module.split("."), *(alias.name for alias in node.names)]))
            if private and module.partition(".")[0] not in ("fl_adapters", "fl_runtime"):
                yield node.lineno, ast.unparse(node)


def test_only_trainers_touch_private_names_of_frameworks() -> None:
    faults = [
        f"{shown(path, line)} uses `{expression}`; give the integration's trainer.py a function for it"
        for path in python_files("integrations")
        if path.name != "trainer.py"
        for line, expression in private_accesses(tree_of(path))
    ]
    assert not faults, "\n".join(faults)


def test_private_access_is_noticed() -> None:
    text = """
from torch._six import x
from torch import _y
self._ours = self._a; cls._b; super()._c; other._ours; other.__dict__; _
trainer._d; os._exit(1)
getattr(trainer, "_e", None)
self.trainer._f
"""
    found = [line for line, _ in private_accesses(ast.parse(text))]
    assert sorted(found) == [2, 3, 5, 6, 7]
