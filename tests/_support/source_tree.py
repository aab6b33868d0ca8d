"""The project's source files as the tests of its rules read them: text and syntax trees, never imported."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fl_runtime", "fl_adapters", "integrations")
INTEGRATIONS = {path.name for path in (ROOT / "integrations").iterdir() if (path / "__init__.py").exists()}

DocumentedNode = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """Return the name that a file is imported by: integrations/hf/x.py is fl_adapters.hf.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "integrations" and len(parts) > 2:
        parts[0] = "fl_adapters"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(*folders: str) -> list[Path]:
    """Return all Python files below these folders of the project, except generated ones."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not path.stem.endswith("_pb2")]


SOURCES = {module_name(path): path for path in python_files(*PACKAGES)}
"""Module name -> its file, for every module that users install."""


def shown(path: Path, line: int | None = None) -> str:
    """Return a file's path, and a line in it, as editors open it."""
    name = str(path.relative_to(ROOT))
    return name if line is None else f"{name}:{line}"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and absolute name of every import, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield line, documented name and text of the docstrings of modules, classes, functions and assigned names."""
    for node in ast.walk(tree):
        if isinstance(node, DocumentedNode) and (text := ast.get_docstring(node)) is not None:
            yield node.body[0].lineno, getattr(node, "name", "the module"), text
        if isinstance(node, ast.Module | ast.ClassDef):
            for before, after in itertools.pairwise(node.body):
                if isinstance(before, ast.Assign | ast.AnnAssign) and (text := bare_text(after)) is not None:
                    target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
                    yield after.lineno, ast.unparse(target), text


def bare_text(node: ast.AST) -> str | None:
    """Return the string that a statement consists of, or None for any other statement."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).partition("[")[0] in ("Protocol", "TypedDict") for base in node.bases)
