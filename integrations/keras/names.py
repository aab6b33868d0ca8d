"""Names of a model's variables that are the same at every site.

Keras numbers unnamed layers and variables through the whole process: the second model of a process has `dense_3` where
another site has `dense`. Whether a path contains the model's own name depends on how the model was built. Here a name
is the path from the model down to the variable, and unnamed layers are numbered within the layer that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .trainer import own_variables, sublayers

Role = Literal["trainable", "buffer", "frozen"]


@dataclass(frozen=True)
class Named:
    """A live variable of a model.

    Attributes:
        variable: The variable.
        role: "trainable"; "buffer" for state that a trained layer keeps itself, such as moving averages; or "frozen".
    """

    variable: Any
    role: Role


def named_variables(model: Any) -> dict[str, Named]:
    """Name all weights of a built model.

    Returns:
        Name -> variable, such as "encoder/dense_1/kernel"; a shared variable once. Variables of optimizers, metrics
        and random generators are left out.
    """
    weights = {id(v) for v in model.weights}
    named_by_id: dict[int, tuple[str, Named]] = {}
    for name, named in _walk(model, ""):
        if id(named.variable) in weights:
            named_by_id.setdefault(id(named.variable), (name, named))
    for variable in model.weights:  # weights of a layer with a custom `weights` property
        if id(variable) not in named_by_id:
            role: Role = "trainable" if variable.trainable else "buffer"
            named_by_id[id(variable)] = (variable.path, Named(variable, role))
    names = _distinct(name for name, _ in named_by_id.values())
    return dict(zip(names, (named for _, named in named_by_id.values()), strict=True))


def named_layers(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name all layers below a model.

    Args:
        model: The model.
        prefix: What the names begin with.

    Yields:
        Name and layer, such as ("encoder/dense_1", layer); a layer comes before those that it holds. A shared layer
        comes again under each of its names.
    """
    children = sublayers(model)
    for name, child in zip(_numbered((c.name, _snake(type(c).__name__)) for c in children), children, strict=True):
        yield prefix + name, child
        yield from named_layers(child, f"{prefix}{name}/")


def _walk(layer: Any, prefix: str) -> Iterator[tuple[str, Named]]:
    made_to_train, others = own_variables(layer)
    own = [*made_to_train, *others]
    weights = {id(v) for v in made_to_train}
    for name, variable in zip(_numbered((v.name, "variable") for v in own), own, strict=True):
        yield prefix + name, Named(variable, _role(layer, variable, is_weight=id(variable) in weights))
    children = sublayers(layer)
    for name, child in zip(_numbered((c.name, _snake(type(c).__name__)) for c in children), children, strict=True):
        yield from _walk(child, f"{prefix}{name}/")


def _role(layer: Any, variable: Any, *, is_weight: bool) -> Role:
    if is_weight:
        return "trainable" if variable.trainable and layer.trainable else "frozen"
    return "buffer" if layer.trainable else "frozen"


def _numbered(given: Iterable[tuple[str, str]]) -> list[str]:
    """Names of siblings, given as (name, default name); those that Keras derived from the default are renumbered."""
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
    """Make names unique: a repeated one gets a number."""
    seen: dict[str, None] = {}
    for name in names:
        number, free = 0, name
        while free in seen:
            number += 1
            free = f"{name}_{number}"
        seen[free] = None
    return list(seen)


def _snake(name: str) -> str:
    """The default name that Keras derives from a class: "BatchNormalization" -> "batch_normalization"."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
