"""A strategy as settings: a frozen dataclass with checked arguments, written "name:argument=value,argument=value"."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from fl_runtime.aggregation.workflow import Workflow
from fl_runtime.errors import ConfigError


@dataclass(frozen=True)
class _Bounds:
    """What values a number may have; None: no bound on that side."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        sides = (("above", self.above), ("of at least", self.least), ("below", self.below), ("of at most", self.most))
        return " and ".join(f"{word} {bound:g}" for word, bound in sides if bound is not None)


def number(
    default: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of a strategy that is a finite number within bounds; whole numbers only if `default` is an int."""
    return field(default=default, metadata={"bounds": _Bounds(above, least, below, most)})


def choice(default: str, *others: str) -> Any:
    """A field of a strategy that is one of these words."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Described(Workflow):
    """Base of all strategies. A subclass is a frozen dataclass whose fields are made by `number` and `choice`.

    name: what a user writes in `--strategy` and `Job(strategy=...)`. Bad values raise ConfigError when the object is
    made, whoever makes it.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, self._checked(item, getattr(self, item.name)))

    @property
    def spec(self) -> str:
        """ "name:argument=value,...", with the arguments that differ from the defaults; `parsed` reads it back."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @classmethod
    def parsed(cls, arguments: str) -> Self:
        """The strategy of "argument=value,argument=value"; "" takes the defaults."""
        known = [item.name for item in fields(cls)]
        given: dict[str, Any] = {}
        for part in filter(None, (text.strip() for text in arguments.split(","))):
            key, equals, value = (text.strip() for text in part.partition("="))
            if key not in known or not equals:
                fix = f"its arguments are: {', '.join(known)}" if known else f"write {cls.name}"
                what = f"has no argument {key!r}" if equals else f"cannot read {part!r}, which is no argument=value"
                raise ConfigError(f"the strategy {cls.name} {what}", where="strategy", fix=fix)
            if key in given:
                raise ConfigError(f"the strategy {cls.name} got {key} twice", where="strategy", fix="give it once")
            given[key] = value
        return cls(**given)

    def check_sites(self, fewest: int) -> None:
        """ConfigError if a round of this strategy cannot work with `fewest` updates, the fewest that a job allows."""

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What all sites, and all updates, must have in common of a tensor's shape: here, all of it."""
        return shape

    def refuse(self, argument: str, wanted: str) -> ConfigError:
        """The error for an argument that is not as `wanted`."""
        value = getattr(self, argument)
        return ConfigError(
            f"the strategy {self.name} cannot work with {argument}={value}", where="strategy", fix=f"give {wanted}"
        )

    def _checked(self, item: dataclasses.Field[Any], value: object) -> Any:
        """The value as the field's type; text is what a spec holds."""
        choices = item.metadata.get("choices")
        if choices:
            if value not in choices:
                raise self.refuse(item.name, f"one of: {', '.join(choices)}")
            return value
        bounds, whole = item.metadata["bounds"], isinstance(item.default, int)
        found = _number(value, whole=whole)
        if found is None or not bounds.hold(found):
            raise self.refuse(item.name, f"a {'whole ' if whole else ''}number {bounds}".strip())
        return found


def _number(value: object, *, whole: bool) -> float | None:
    """The number that `value` is, or that it says as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        return None
    try:
        found = float(value)
        if not whole:
            return found
        return int(found) if found.is_integer() else None
    except (ValueError, OverflowError):
        return None


def find(kinds: Iterable[type[Described]], spec: str) -> Described:
    """The strategy that a spec describes, of these kinds. ConfigError for an unknown name lists the known ones."""
    name, _, arguments = spec.partition(":")
    by_name = {kind.name: kind for kind in kinds}
    if name.strip().lower() not in by_name:
        raise ConfigError(f"unknown strategy {name!r}", where="strategy", fix=f"use one of: {', '.join(by_name)}")
    return by_name[name.strip().lower()].parsed(arguments)
