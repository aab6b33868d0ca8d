"""No import circle among our modules, imports in functions and under TYPE_CHECKING included."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import pairwise

from source_tree import SOURCES, imports, shown, tree_of

Graph = Mapping[str, Mapping[str, int]]
"""Module -> the modules of ours that it imports, each with the line of the import."""


def edges(tree: ast.Module, module: str, names: Iterable[str], *, is_package: bool) -> dict[str, int]:
    """Return the modules among `names` that this one imports, with the line of each import.

    `from a import b` is an import of the module a.b if there is one, else of a. The packages above an imported module
    are not counted, although Python runs their `__init__.py` too: every file would form a circle with its package.
    """
    known, found = set(names), dict[str, int]()
    for line, target in imports(tree, module, is_package=is_package):
        name = target if target in known else target.rpartition(".")[0]
        if name in known and name != module:
            found.setdefault(name, line)
    return found


def shortest_circle(graph: Graph, start: str) -> list[str] | None:
    """Return the shortest way from a module back to itself, with the module at both ends, or None."""
    came_from: dict[str, str] = {}
    queue = deque([start])
    while queue:
        module = queue.popleft()
        for target in graph.get(module, {}):
            if target == start:
                circle = [start, module]
                while circle[-1] != start:
                    circle.append(came_from[circle[-1]])
                return circle[::-1]
            if target not in came_from:
                came_from[target] = module
                queue.append(target)
    return None


def circles(graph: Graph) -> list[list[str]]:
    """Return import circles, the shortest first; each module is in one of them at most."""
    found, seen = list[list[str]](), set[str]()
    every = [circle for module in sorted(graph) if (circle := shortest_circle(graph, module))]
    for circle in sorted(every, key=len):
        if not seen & set(circle):
            found.append(circle)
            seen |= set(circle)
    return found


def test_no_import_circle() -> None:
    graph = {
        module: edges(tree_of(path), module, SOURCES, is_package=path.name == "__init__.py")
        for module, path in SOURCES.items()
    }
    faults = []
    for circle in circles(graph):
        steps = [
            f"  {shown(SOURCES[module], graph[module][target])} imports {target}" for module, target in pairwise(circle)
        ]
        faults.append("\n".join(["import circle; move what both need into a module that neither imports:", *steps]))
    assert not faults, "\n".join(faults)


def test_a_circle_is_noticed_wherever_the_import_stands() -> None:
    names = {
        "a": "if TYPE_CHECKING:\n    from b import B",
        "b": "def f():\n    from c import d",
        "c.d": "import a",
        "c": "from a import x",
        "e": "import a, b",
    }
    graph = {name: edges(ast.parse(text), name, names, is_package=False) for name, text in names.items()}
    assert circles(graph) == [["a", "b", "c.d", "a"]]
    assert graph["b"] == {"c.d": 2}
