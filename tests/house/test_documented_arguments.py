"""Docstrings of public names document the arguments, fields and results that their signatures have."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from griffe import Docstring, DocstringSectionKind, Parser
from public_names import PUBLIC
from source_tree import SOURCES, classes, is_protocol, shown, tree_of

from fl_runtime.types import Aggregator, Strategy

# Where the protocols are that the author of an adapter implements.
FOR_AUTHORS = ("fl_adapters.adapter", "fl_adapters.participant.local_work", "fl_adapters.torch")

# Classes that users get from a call and never make: their constructors are not for users.
HANDED_OUT = {"ConnectedSite", "SiteTask"}

# Protocols that strategies implement without inheriting from them. They document the methods of all strategies.
IMPLEMENTED = (Strategy, Aggregator)

Section = DocstringSectionKind


def adapter_protocols() -> Iterator[tuple[str, str]]:
    """Module and name of each public protocol that the author of an adapter implements."""
    for module, path in SOURCES.items():
        if f"{module}.".startswith(tuple(f"{start}." for start in FOR_AUTHORS)):
            for node in classes(tree_of(path)):
                if is_protocol(node) and not node.name.startswith("_"):
                    yield module, node.name


def test_documented_arguments_are_those_of_the_signatures() -> None:
    public = [(module, name) for module, names in PUBLIC.items() for name in names.split()]
    faults: dict[str, None] = {}
    for module, name in [*public, *adapter_protocols()]:
        found = getattr(import_module(module), name)
        if inspect.isclass(found):
            faults |= dict.fromkeys([*class_faults(found), *method_faults(found)])
        elif inspect.isfunction(found):
            faults |= dict.fromkeys(function_faults(found, [inspect.getdoc(found) or ""]))
    assert not faults, "\n".join(faults)


def documented(*texts: str) -> dict[Section, list[str]]:
    """The sections of Google-style docstrings, each with the names that it documents.

    Args:
        texts: The docstring itself, then those that it stands for: a method says only in what it differs from the
            one that it overrides. A section of an earlier text hides the same one of a later text.
    """
    found: dict[Section, list[str]] = {}
    for text in texts:
        for section in Docstring(text).parse(Parser.google, warnings=False):
            named = section.kind in (Section.parameters, Section.other_parameters, Section.attributes)
            found.setdefault(section.kind, [item.name.lstrip("*") for item in section.value] if named else [])
    return found


def is_ours(thing: Any) -> bool:
    return thing.__module__.partition(".")[0] in ("fl_runtime", "fl_adapters")


def own_parts(found: type) -> Iterator[tuple[str, Any]]:
    """The public functions that a class has from classes of ours, with the names that hide a framework's left out.

    A hook of a framework (`on_train_begin`) has the signature and the meaning that the framework documents.
    """
    for part in dir(found):
        owner = next((base for base in found.__mro__ if part in vars(base)), None)
        if part.startswith("_") or owner is None or not is_ours(owner):
            continue
        value = vars(owner)[part]
        function = getattr(value, "__func__", value)
        hidden = any(part in vars(base) for base in found.__mro__ if not is_ours(base) and base is not object)
        if inspect.isfunction(function) and not hidden:
            yield part, function


def method_faults(found: type) -> Iterator[str]:
    for part, function in own_parts(found):
        bases = [*found.__mro__, *(protocol for protocol in IMPLEMENTED if implements(found, protocol))]
        texts = [vars(base)[part].__doc__ or "" for base in bases if part in vars(base)]
        yield from function_faults(function, texts, skip=0 if is_static(found, part) else 1)


def implements(found: type, protocol: type) -> bool:
    return all(hasattr(found, name) for name in vars(protocol) if not name.startswith("_"))


def is_static(found: type, part: str) -> bool:
    return isinstance(inspect.getattr_static(found, part), staticmethod)


def class_faults(found: type) -> Iterator[str]:
    text = inspect.getdoc(found) or ""
    sections = documented(text)
    place = location(found)
    if dataclasses.is_dataclass(found):
        names = [field.name for field in dataclasses.fields(found) if not field.name.startswith("_")]
        own = [name for name in names if name in vars(found).get("__annotations__", {})]
        told = sections.get(Section.attributes, [])
        if missing := [name for name in own if name not in told]:
            yield f"{place}: list under Attributes: {', '.join(missing)}"
        if unknown := [name for name in told if name not in names and not hasattr(found, name)]:
            yield f"{place}: has no field {', '.join(unknown)}; remove it from Attributes"
    elif "__init__" in vars(found) and not getattr(found, "_is_protocol", False) and found.__name__ not in HANDED_OUT:
        init = vars(found)["__init__"]
        yield from argument_faults(place, parameters(init, 1), documented(text, inspect.cleandoc(init.__doc__ or "")))
    elif not text:
        yield f"{place}: has no docstring"


def function_faults(function: Any, texts: Sequence[str], skip: int = 0) -> Iterator[str]:
    place, sections = location(function), documented(*map(inspect.cleandoc, texts))
    if not any(texts):
        yield f"{place}: has no docstring"
        return
    yield from argument_faults(place, parameters(function, skip), sections)
    returned = str(function.__annotations__.get("return", "None"))
    given = returned not in ("None", "Never", "NoReturn", "typing.NoReturn", "Self")
    if given and not {Section.returns, Section.yields} & set(sections):
        yield f"{place}: write Returns: (or Yields:) for `{returned}`"


def argument_faults(place: str, names: Sequence[str], sections: dict[Section, list[str]]) -> Iterator[str]:
    told = sections.get(Section.parameters, []) + sections.get(Section.other_parameters, [])
    if missing := [name for name in names if name not in told]:
        yield f"{place}: list under Args: {', '.join(missing)}"
    if unknown := [name for name in told if name not in names]:
        yield f"{place}: has no argument {', '.join(unknown)}; remove it from Args"
    if not missing and not unknown and told != list(names):
        yield f"{place}: list Args in the order of the signature: {', '.join(names)}"


def parameters(function: Any, skip: int) -> list[str]:
    """The names of a function's parameters, `self` or `cls` and those with a leading underscore left out."""
    return [name for name in list(inspect.signature(function).parameters)[skip:] if not name.startswith("_")]


def location(found: Any) -> str:
    """Where a class or function is defined, and its name."""
    path = SOURCES.get(found.__module__)
    line = inspect.getsourcelines(inspect.unwrap(found))[1]
    return f"{shown(path, line) if path else found.__module__} {found.__qualname__}"


def test_what_a_docstring_lacks_is_named() -> None:
    def f(a: int, *, b: int = 0, _c: int = 0, **more: int) -> int:
        """Add the numbers that are given.

        Args:
            b: The second one.
            d: Nothing of this name.
        """
        return a + b

    @dataclasses.dataclass
    class Record:
        """A record with two fields.

        Attributes:
            a: The first one.
            b: The other one.
        """

        a: int
        c: int = 0

    faults = [fault.split(": ", 1)[1] for fault in function_faults(f, [f.__doc__ or ""])]
    assert faults == [
        "list under Args: a, more",
        "has no argument d; remove it from Args",
        "write Returns: (or Yields:) for `int`",
    ]
    faults = [fault.split(": ", 1)[1] for fault in class_faults(Record)]
    assert faults == ["list under Attributes: c", "has no field b; remove it from Attributes"]
