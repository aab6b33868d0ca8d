"""Names of a model's variables that are the same at every site.

Keras numbers unnamed layers and variables through the whole process: the second model of a process has `dense_3` where
another site has `dense`, and whether the model's own name is a part of a path depends on how it was built. Here a name
is the way from the model down to the variable, and unnamed layers are numbered within the layer that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["trainable", "buffer", "frozen"]


@dataclass(frozen=True)
class Named:
    """A live variable. role: trained, state that layers keep for themselves (moving averages), or frozen."""

    variable: Any
    role: Role


def named_variables(model: Any) -> dict[str, Named]:
    """Name -> variable of all weights of a built model, such as "encoder/dense_1/kernel"; a shared one once.

    Optimizer, metrics and the states of random generators are not among them.
    """
    weights = {id(v) for v in model.weights}
    found: dict[int, tuple[str, Named]] = {}
    for name, named in _walk(model, ""):
        if id(named.variable) in weights:
            found.setdefault(id(named.variable), (name, named))
    for variable in model.weights:  # what a layer gives out in a way of its own
        if id(variable) not in found:
            role: Role = "trainable" if variable.trainable else "buffer"
            found[id(variable)] = (variable.path, Named(variable, role))
    names = _distinct(name for name, _ in found.values())
    return dict(zip(names, (named for _, named in found.values()), strict=True))


def _walk(layer: Any, prefix: str) -> Iterator[tuple[str, Named]]:
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    weights = {id(v) for v in layer._trainable_variables}
    for name, variable in zip(_numbered((v.name, "variable") for v in own), own, strict=True):
        yield prefix + name, Named(variable, _role(layer, variable, is_weight=id(variable) in weights))
    children = list(layer._flatten_layers(recursive=False, include_self=False))
    for name, child in zip(_numbered((c.name, _snake(type(c).__name__)) for c in children), children, strict=True):
        yield from _walk(child, f"{prefix}{name}/")


def _role(layer: Any, variable: Any, *, is_weight: bool) -> Role:
    if is_weight:
        return "trainable" if variable.trainable and layer.trainable else "frozen"
    return "buffer" if layer.trainable else "frozen"


def _numbered(given: Iterable[tuple[str, str]]) -> list[str]:
    """(name, what Keras would call it) of siblings -> their names, those that Keras made up numbered anew."""
    counts: dict[str, int] = {}
    names = []
    for name, automatic in given:
        if re.fullmatch(rf"{re.escape(automatic)}(_\d+)?", name):
            number = counts.get(automatic, 0)
            counts[automatic] = number + 1
            name = f"{automatic}_{number}" if number else automatic
        names.append(name)
    return _distinct(names)


def _distinct(names: Iterable[str]) -> list[str]:
    """Each name once: a number is added where it has been there before."""
    seen: dict[str, None] = {}
    for name in names:
        number, free = 0, name
        while free in seen:
            number += 1
            free = f"{name}_{number}"
        seen[free] = None
    return list(seen)


def _snake(name: str) -> str:
    """The name that Keras makes of a class's name: "BatchNormalization" -> "batch_normalization"."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
