"""Writes a function, such as one of a notebook, as a script that a process per site can run.

The function travels by its source. Beside it the script holds what the function uses from around it: imports,
functions and classes that are defined there, and plain values. Nothing is pickled. Nothing is forked either: the copy
of a process with threads, a GPU or a compiled graph may hang, and a notebook has threads before its first cell.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import linecache
import math
import os
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from types import FunctionType, ModuleType
from typing import Any

from fl_runtime.errors import ConfigError

_WHERE = "Simulation(script=)"
_VALUE_CHARS = 2**16
_CONTAINERS: dict[Any, tuple[str, str]] = {tuple: ("(", ")"), list: ("[", "]"), set: ("{", "}")}
_SCRIPT = '''"""{name}(), as Simulation(script={name}) has written it for the processes of the sites."""
{future}
import sys

sys.path[:1] = [path for path in {paths!r} if path not in sys.path[1:]]
{body}

if __name__ == "__main__":
    {name}()
'''


def function_script(function: Callable[[], object]) -> str:
    """Return the script that calls a function in a process of its own.

    Args:
        function: A function without required parameters, defined with `def` in a notebook, a script or a module.

    Returns:
        The source: imports, what the function uses, the function, and its call where the script is run.

    Raises:
        ConfigError: The function cannot be called like this, its source is not known, or it uses a value that cannot
            be written as source. The error says what to do.
    """
    plain = _checked(function)
    script = _Script(plain.__globals__, plain.__module__, plain.__name__)
    script.add(plain.__name__, function)
    future = plain.__code__.co_flags & __future__.annotations.compiler_flag
    return _SCRIPT.format(
        name=plain.__name__,
        future="\nfrom __future__ import annotations\n" if future else "",
        paths=[os.path.abspath(path) for path in sys.path],
        body="\n".join(script.parts),
    )


def _checked(function: Any) -> FunctionType:
    """The function without its decorators. Raises ConfigError unless it can be called without arguments."""
    plain = inspect.unwrap(function) if callable(function) else function
    if not isinstance(plain, FunctionType):
        raise ConfigError(
            f"{function!r:.100} is not a function defined with def",
            where=_WHERE,
            fix="give a function of this notebook or script; a file goes into Job(app='train.py')",
        )
    required = [
        item.name
        for item in inspect.signature(function).parameters.values()
        if item.default is item.empty and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
    ]
    if required:
        raise ConfigError(
            f"{plain.__name__}() has the parameters {', '.join(required)}, and sites call it without arguments",
            where=_WHERE,
            fix="give them defaults; fl_adapters.site() in the function says which site it is",
        )
    if inspect.iscoroutinefunction(plain) or inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise ConfigError(
            f"calling {plain.__name__}() does not run it, since it is async or has a yield",
            where=_WHERE,
            fix="give a function with def that trains when it is called",
        )
    return plain


class _Script:
    """Collects the source of a function and of what it uses, in an order in which Python can run it."""

    def __init__(self, namespace: dict[str, Any], module: str, function: str) -> None:
        self._namespace, self._module, self._function = namespace, module, function
        self._known: dict[str, Any] = {}
        self.parts: list[str] = []

    def add(self, name: str, value: Any) -> None:
        """Add what gives `name` its value, unless it is there."""
        if name in self._known:
            if self._known[name] is not value:
                raise ConfigError(
                    f"{self._function}() uses two definitions of the name {name}",
                    where=_WHERE,
                    fix="give one of them another name, and run its cell again",
                )
            return
        self._known[name] = value
        if isinstance(value, ModuleType):
            self.parts.append(f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}")
        elif self._is_defined_here(value):
            self._define(name, value)
        elif line := _import_line(name, value):
            self.parts.append(line)
        elif (text := _literal(value)) is not None:
            self.parts.append(f"{name} = {text}")
        else:
            raise ConfigError(
                f"{self._function}() uses {name}, a {type(value).__name__} that the processes of the sites do not have",
                where=_WHERE,
                fix=f"make or load it in {self._function}() or in a function that it calls; what is large or slow to "
                "make, save to a file and read it there",
            )

    def _is_defined_here(self, value: Any) -> bool:
        """Whether the sites get a function or class by its source: no process of theirs could import it."""
        plain = inspect.unwrap(value) if callable(value) else value
        if not isinstance(plain, (FunctionType, type)) or plain.__module__ != self._module:
            return False
        return self._module == "__main__" or "<locals>" in plain.__qualname__ or not _is_found(self._module)

    def _define(self, name: str, value: Any) -> None:
        plain = inspect.unwrap(value)
        own = plain.__name__
        if isinstance(plain, FunctionType) and (free := [v for v in plain.__code__.co_freevars if v != "__class__"]):
            raise ConfigError(
                f"{own}() uses {', '.join(free)} of the function around it",
                where=_WHERE,
                fix="define it at the top level of a cell or file, with values as defaults of its parameters",
            )
        if own != name:
            self.add(own, value)
            self.parts.append(f"{name} = {own}")
            return
        source = textwrap.dedent(_source(plain)).rstrip()
        for used in _names_in(source):
            self._use(used, source)
        self.parts.append(f"\n\n{source}\n")

    def _use(self, name: str, source: str) -> None:
        """Add what a name in a source means here. A name that means nothing is left: it may never be reached."""
        if name.startswith("__") and name.endswith("__"):
            return
        if name in self._namespace:
            value = self._namespace[name]
            if callable(value) and inspect.unwrap(value) is getattr(builtins, name, self):
                return  # IPython has an open() of its own around Python's
            self.add(name, value)
            if isinstance(value, ModuleType):
                self.parts += [f"import {module}" for module in _submodules(name, value, source)]
        elif str(getattr(getattr(builtins, name, None), "__module__", "")).startswith("IPython"):
            self.add(name, getattr(builtins, name))  # such as display(), which IPython adds to all code


def _source(thing: Any) -> str:
    """The source of a function or class. Raises ConfigError if it is not known."""
    name = thing.__name__
    try:
        source = inspect.getsource(thing) if isinstance(thing, FunctionType) else _class_source(thing)
        [node] = ast.parse(textwrap.dedent(source)).body
    except (OSError, TypeError, SyntaxError, ValueError):
        node, source = None, ""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name != name:
        raise ConfigError(
            f"the source of {name} is not known, and it reaches the sites by its source",
            where=_WHERE,
            fix="define it with def or class in a cell of its own, or in a file: Job(app='train.py')",
        )
    return source


def _class_source(given: type) -> str:
    """The source of a class. Python itself finds none in a notebook, whose cells are no files."""
    try:
        return inspect.getsource(given)
    except (OSError, TypeError):
        pass
    files = [
        part.__code__.co_filename
        for part in map(inspect.unwrap, filter(callable, vars(given).values()))
        if isinstance(part, FunctionType) and part.__qualname__.startswith(f"{given.__qualname__}.")
    ]
    cells = [name for name in linecache.cache if not os.path.exists(name)]
    where = [name for name in files if name in linecache.cache] or cells
    found = {source: None for file in where for source in _classes_in(file, given)}
    if len(found) != 1:  # without methods, nothing tells which of several definitions it is
        raise OSError
    return next(iter(found))


def _classes_in(file: str, given: type) -> Iterator[str]:
    lines = linecache.getlines(file)
    text = "".join(lines)
    if f"class {given.__name__}" not in text:
        return
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == given.__name__:
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            yield "".join(lines[first - 1 : node.end_lineno])


def _names_in(source: str) -> list[str]:
    """Names that a definition takes from around it, in the order of their first use."""
    found: dict[str, None] = {}
    own = {node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    def look(table: symtable.SymbolTable) -> None:
        outermost = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or (outermost and symbol.get_name() not in own)):
                found[symbol.get_name()] = None
        for child in table.get_children():
            look(child)

    look(symtable.symtable(source, "<script>", "exec"))
    return [name for name in found if name not in own]


def _submodules(name: str, module: ModuleType, source: str) -> list[str]:
    """Modules below `module` that a source reaches by dots, as `os.path` in a source with `import os`."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if chain.startswith(f"{name}."):
            full = module.__name__ + chain[len(name) :]
            if full in sys.modules and sys.modules[full].__name__ == full:
                found[full] = None
    return list(found)


def _import_line(name: str, value: Any) -> str:
    """The line that imports a value under a name; "" if no module has it."""
    owner = getattr(value, "__module__", None)
    for attribute in (getattr(value, "__qualname__", ""), name):
        if attribute.isidentifier() and _is_attribute(owner, attribute, value):
            return f"from {owner} import {attribute}" + ("" if attribute == name else f" as {name}")
    if type(value) in (bool, int, float, str, bytes, type(None), *_CONTAINERS, dict):
        return ""  # equal values are one object by chance
    for module_name in sorted(sys.modules, key=len):  # such as torch.float32, which says not where it lies
        if _is_attribute(module_name, name, value):
            return f"from {module_name} import {name}"
    return ""


def _is_attribute(module: Any, attribute: str, value: Any) -> bool:
    """Whether a module that can be imported by its name has this value under a name."""
    found = sys.modules.get(module) if isinstance(module, str) and not module.startswith("__") else None
    if getattr(found, "__spec__", None) is None or vars(found).get(attribute) is not value:
        return False
    return _is_found(module)


def _is_found(module: str) -> bool:
    """Whether a new process with this `sys.path` can import a module; one loaded from a file may lie nowhere on it."""
    path: Sequence[str] | None = None
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _literal(value: Any) -> str | None:
    """A plain value as source; None for one that is not plain, or too long."""
    try:
        text = _plain_text(value)
    except (ValueError, RecursionError):
        return None
    return text if len(text) <= _VALUE_CHARS else None


def _plain_text(value: Any) -> str:
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return f"float({str(value)!r})"
    if value is None or kind in (bool, int, float, str, bytes):
        return repr(value)
    if isinstance(value, PurePath):
        return f"__import__('pathlib').Path({str(value)!r})"
    if kind is dict:
        return "{" + ", ".join(f"{_plain_text(key)}: {_plain_text(item)}" for key, item in value.items()) + "}"
    if kind is set and not value:
        return "set()"
    if kind not in _CONTAINERS:
        raise ValueError
    opening, closing = _CONTAINERS[kind]
    inside = ", ".join(map(_plain_text, value))
    return f"{opening}{inside}{',' if kind is tuple and len(value) == 1 else ''}{closing}"
