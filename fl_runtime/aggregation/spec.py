"""Strategies as text: a frozen dataclass with checked arguments, written "name:argument=value,argument=value"."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from fl_runtime.aggregation.workflow import Workflow
from fl_runtime.errors import ConfigError, did_you_mean
from fl_runtime.types import Arrays, Update


@dataclass(frozen=True)
class _Bounds:
    """Bounds of a number; None means no bound on that side."""

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
    """Declare a strategy's argument that is a finite number within bounds; None means no bound.

    Args:
        default: Default value. If it is an int, only whole numbers are accepted.
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        below: Exclusive upper bound.
        most: Inclusive upper bound.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"bounds": _Bounds(above, least, below, most)})


def choice(default: str, *others: str) -> Any:
    """Declare a strategy's argument that is one of several words.

    Args:
        default: Default value.
        others: The other accepted values.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Described(Workflow):
    """Base of all strategies. A subclass is a frozen dataclass whose fields are declared with `number` and `choice`.

    Attributes:
        name: Name of the strategy in `--strategy` and `Job(strategy=...)`.
        scalable: Whether the server can scale down the weight of one update, see `Strategy`.
        summable: Whether the mean of the updates is enough, see `Strategy`.
        partial: Whether updates may lack tensors, see `Strategy`.
        needs_steps: Whether updates must state their number of optimizer steps, see `Strategy`.
        open_ended: Whether the run has no number of rounds, see `Strategy`.
        shows: What of a single site's update other sites get, see `Strategy`.

    Raises:
        ConfigError: If an argument is out of range, when the object is made.

    Example:
        @dataclass(frozen=True)
        class HalfStep(FedAvg):
            name: ClassVar[str] = "half-step"
            factor: float = number(0.5, above=0, most=1)
    """

    name: ClassVar[str]
    scalable: ClassVar[bool] = True
    summable: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    needs_steps: ClassVar[bool] = False
    open_ended: ClassVar[bool] = False
    shows: ClassVar[Literal["", "trees", "updates"]] = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, self._checked(item, getattr(self, item.name)))

    @property
    def spec(self) -> str:
        """The strategy as text: its name, and the arguments that differ from their defaults."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @classmethod
    def parsed(cls, arguments: str) -> Self:
        """Make the strategy from the text after its name.

        Args:
            arguments: "argument=value,argument=value"; "" takes the defaults.

        Returns:
            The strategy.

        Raises:
            ConfigError: If an argument is unknown, given twice, or out of range.
        """
        names = [item.name for item in fields(cls)]
        values: dict[str, Any] = {}
        for part in filter(None, (text.strip() for text in arguments.split(","))):
            key, equals, value = (text.strip() for text in part.partition("="))
            if key not in names or not equals:
                known = f"{did_you_mean(key, names)}its arguments are: {', '.join(names)}"
                fix = known if names else f"write {cls.name} without arguments"
                what = f"has no argument {key!r}" if equals else f"cannot read {part!r}, which is not argument=value"
                raise ConfigError(f"the strategy {cls.name} {what}", where="strategy", fix=fix)
            if key in values:
                raise ConfigError(f"the strategy {cls.name} got {key} twice", where="strategy", fix="give it once")
            values[key] = value
        return cls(**values)

    def check_sites(self, fewest: int) -> None:
        """Check the job's quorum.

        Args:
            fewest: Smallest number of updates with which the job lets a round close.

        Raises:
            ConfigError: If a round of this strategy needs more. The base class accepts any number.
        """

    def cohort(self, updates: int) -> int:
        """Return how many of a round's updates make the next model. The base class returns all of them.

        Args:
            updates: Number of updates in the round.

        Returns:
            The number.
        """
        return updates

    def weights_of(self, updates: Sequence[Update]) -> Sequence[float]:
        """Return the weights with which updates count.

        Args:
            updates: The updates of a round, or of a buffer.

        Returns:
            Number of examples times the job's factor; with the argument `weights` "equal", the factor alone.
        """
        equal = getattr(self, "weights", "examples") == "equal"
        return [update.site_weight if equal else update.weight for update in updates]

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the part of a tensor's shape that must be equal at all sites.

        Args:
            name: Name of the tensor.
            shape: Its shape at one site.

        Returns:
            The shape, with -1 for dimensions that may differ. The base class returns the whole shape.
        """
        return shape

    def finished(self, arrays: Arrays) -> bool:
        """Return whether the run ends with a global model. The base class returns False: it has a number of rounds.

        Args:
            arrays: The model.

        Returns:
            Whether no further round is opened.
        """
        return False

    def refuse(self, argument: str, wanted: str) -> ConfigError:
        """Make the error for an argument with a value that cannot work.

        Args:
            argument: Name of the argument.
            wanted: The values that can work, such as "a number above 0".

        Returns:
            The error, for the caller to raise.
        """
        value = getattr(self, argument)
        return ConfigError(
            f"the strategy {self.name} cannot work with {argument}={value}", where="strategy", fix=f"give {wanted}"
        )

    def _checked(self, item: dataclasses.Field[Any], value: object) -> Any:
        """Return a value, which may be text, as the field's type. Raises ConfigError if it is not allowed."""
        choices = item.metadata.get("choices")
        if choices:
            if value not in choices:
                raise self.refuse(item.name, f"one of: {', '.join(choices)}")
            return value
        bounds, whole = item.metadata["bounds"], isinstance(item.default, int)
        parsed = _number(value, whole=whole)
        if parsed is None or not bounds.hold(parsed):
            raise self.refuse(item.name, f"a {'whole ' if whole else ''}number {bounds}".strip())
        return parsed


def _number(value: object, *, whole: bool) -> float | None:
    """Return a number, or text that holds one, as float or int; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        return None
    try:
        parsed = float(value)
        if not whole:
            return parsed
        return int(parsed) if parsed.is_integer() else None
    except (ValueError, OverflowError):
        return None


def find(kinds: Iterable[type[Described]], spec: str) -> Described:
    """Make one of several strategies from its text.

    Args:
        kinds: Classes of strategies.
        spec: "name" or "name:argument=value,...".

    Returns:
        The strategy.

    Raises:
        ConfigError: If no class has this name, or an argument is wrong.
    """
    name, _, arguments = spec.partition(":")
    by_name = {kind.name: kind for kind in kinds}
    if name.strip().lower() not in by_name:
        fix = f"{did_you_mean(name, by_name)}use one of: {', '.join(by_name)}"
        raise ConfigError(f"unknown strategy {name!r}", where="strategy", fix=fix)
    return by_name[name.strip().lower()].parsed(arguments)
