"""How large classes and callbacks may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source_tree import ROOT, SOURCES, classes, is_protocol, methods, shown, tree_of

MAX_FIELDS = 15
MAX_PUBLIC_METHODS = 20
MAX_CALLBACK_LINES = 250

CALLBACKS = (
    "integrations/hf/callback.py",
    "integrations/keras/callback.py",
    "integrations/lightning/callback.py",
    "integrations/monai/handler.py",
)

# Records of settings with more fields, each with the reason. No object with behaviour belongs here.
SETTINGS = {
    "Job": "one field for each setting of a job file, which users write (docs/jobs.md)",
    "Policy": "one field for each setting of policy.yml, which sites write (docs/production.md)",
    "RunSettings": "the settings of a job as the server, its journal and the sites read them",
}


@pytest.mark.parametrize("file", CALLBACKS)
def test_a_callback_only_translates(file: str) -> None:
    lines = len((ROOT / file).read_text("utf-8").splitlines())
    fault = f"{file} has {lines} lines, the limit is {MAX_CALLBACK_LINES}; move what does not translate hooks"
    assert lines <= MAX_CALLBACK_LINES, fault


def annotated_fields(node: ast.ClassDef) -> set[str]:
    """The fields of a dataclass, a NamedTuple or a settings model, as its body annotates them."""
    return {
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and "ClassVar" not in ast.unparse(part.annotation)
    }


def assigned_fields(node: ast.ClassDef) -> set[str]:
    """The names X of all `self.X = ...` in the methods of a class, in tuples, `with` and `for` too."""
    return {
        part.attr
        for method in methods(node)
        for part in ast.walk(method)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


def fields(node: ast.ClassDef) -> set[str]:
    return annotated_fields(node) | (assigned_fields(node) - properties(node))


def properties(node: ast.ClassDef) -> set[str]:
    """Names with a setter: assigning to one makes no further field."""
    decorated = [(method.name, ast.unparse(word)) for method in methods(node) for word in method.decorator_list]
    return {name for name, word in decorated if word.endswith(".setter")}


def public_methods(node: ast.ClassDef) -> set[str]:
    return {method.name for method in methods(node) if not method.name.startswith("_")}


def class_faults(node: ast.ClassDef, place: str) -> Iterator[str]:
    if len(found := fields(node)) > MAX_FIELDS and node.name not in SETTINGS and not is_protocol(node):
        yield (
            f"{place} {node.name} has {len(found)} fields, the limit is {MAX_FIELDS}; "
            f"give those that belong together an object of their own: {', '.join(sorted(found))}"
        )
    if len(found := public_methods(node)) > MAX_PUBLIC_METHODS:
        yield (
            f"{place} {node.name} has {len(found)} public methods and properties, the limit is {MAX_PUBLIC_METHODS}; "
            f"split it by those who call them: {', '.join(sorted(found))}"
        )


def test_no_class_knows_everything() -> None:
    faults = [
        fault
        for path in SOURCES.values()
        for node in classes(tree_of(path))
        for fault in class_faults(node, shown(path, node.lineno))
    ]
    assert not faults, "\n".join(faults)


def test_fields_and_methods_are_counted() -> None:
    text = """
class A:
    kind: ClassVar[str] = ""
    first: int
    def __init__(self):
        self.a, (self.b, self._c) = 1, (2, 3)
        other.d = 4
    @property
    def e(self): return self.a
    @e.setter
    def e(self, value):
        self.f: int = value
        self.e = 1
    def _g(self): ...
"""
    node = next(classes(ast.parse(text)))
    assert fields(node) == {"first", "a", "b", "_c", "f"}
    assert public_methods(node) == {"e"}
