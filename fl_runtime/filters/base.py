"""The contracts of filters, and what the shipped filters share.

A filter is a frozen dataclass whose fields are its arguments; `make_filter` makes it from its settings. There are three
kinds, told apart by their methods:

* `ValueFilter` changes the values of an update. Its `open` returns the object that keeps state between rounds.
* `EncodingFilter` changes which arrays travel; the receiver decodes them.
* `FactsFilter` changes metrics and numbers of examples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np

from fl_runtime.errors import ConfigError
from fl_runtime.filters.calibration import Participation
from fl_runtime.filters.ledger import BudgetLimit
from fl_runtime.types import Array, Arrays, Settings, Task, Update, is_floating

Point = Literal["site_out", "server_in", "server_out", "site_in"]
Layout: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Tensor name -> (dtype, shape), in order."""

F = TypeVar("F", bound="FilterSettings")

AUX = "|"
"""Separator in the names of additional arrays of an encoded tensor, such as `w|scale`."""


@dataclass(frozen=True)
class FilterHost:
    """The site or server at which a filter runs.

    Attributes:
        site: Name of the site; empty at the server.
        job: Name of the job, or of one of its further trainings: JOB/2.
        folder: Folder where this filter may keep state between rounds, or None if it has none.
        from_policy: Whether the site's policy asked for the filter, not the job. Its budget then counts over all jobs.
        budget: Upper limit of the site for the privacy cost of all filters together; None for no limit.
        shared: Folder that all sites of a simulation share, and that the server does not read; None elsewhere.
        participation: Rounds in which something is expected to be released here; None if their number is not known.
        sharing: Number of sites that together add the noise to a secure sum, to which updates leave as weights. 0 if
            the server sees every update.
    """

    site: str = ""
    job: str = ""
    folder: Path | None = None
    from_policy: bool = False
    budget: BudgetLimit | None = None
    shared: Path | None = None
    participation: Participation | None = None
    sharing: int = 0


@dataclass(frozen=True)
class Facts:
    """What leaves a site beside the tensors of an update, or in a report.

    Attributes:
        metrics: Metric name -> number or `Summary`.
        num_examples: Number of training examples; in a report, of validation examples.
        local_steps: Number of optimizer steps; 0 in a report.
        round: The round; in a report, the version of the model.
    """

    metrics: Mapping[str, Any]
    num_examples: int
    local_steps: int = 0
    round: int = 0


class FilterSettings:
    """Base of all filters: a dataclass that can be written as settings.

    Attributes:
        points: Points at which the filter may run. It runs at the first one unless its settings have "at".
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out",)

    def settings(self) -> dict[str, Any]:
        """Return the filter's name and the arguments that differ from their defaults."""
        arguments = {name: value for name, value in asdict(self).items() if value != _default(type(self), name)}  # type: ignore[call-overload]
        return {"name": type(self).__name__, **arguments}


class RunningFilter(Protocol):
    """A value filter with its state, for one site (or the server) and one job."""

    @property
    def record(self) -> Settings:
        """JSON values about the last call, for the run's history."""
        ...

    def __call__(self, update: Update, task: Task) -> Update:
        """Filter one update.

        Args:
            update: An update with content "delta". The filter may write to its arrays.
            task: The task that it answers, with the global model in `arrays`.

        Returns:
            The filtered update, also with content "delta".

        Raises:
            UpdateRefusedError: If the update must not leave.
            PrivacyBudgetError: If it would exceed a privacy budget.
        """
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A running filter that spends a privacy budget."""

    def afford(self, round: int) -> None:
        """Check the budget before the site trains.

        Args:
            round: The round that begins.

        Raises:
            PrivacyBudgetError: If the update of this round could not leave.
        """
        ...


class ValueFilter(Protocol):
    """A filter that changes the values of an update."""

    @property
    def points(self) -> tuple[Point, ...]:
        """Points at which the filter may run."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the filter's name and the arguments that differ from their defaults."""
        ...

    def open(self, host: FilterHost) -> RunningFilter:
        """Make the object that filters updates and keeps state between rounds.

        Args:
            host: The site or server at which it runs.

        Returns:
            The running filter.
        """
        ...


@runtime_checkable
class FactsFilter(Protocol):
    """A filter for metrics and numbers of examples, in updates and in reports."""

    def settings(self) -> dict[str, Any]:
        """Return the filter's name and the arguments that differ from their defaults."""
        ...

    def facts(self, facts: Facts, host: FilterHost) -> Facts:
        """Filter what leaves beside the tensors.

        Args:
            facts: What would leave.
            host: The site at which the filter runs.

        Returns:
            What leaves instead.

        Raises:
            PrivacyBudgetError: If it would exceed a privacy budget.
        """
        ...


@runtime_checkable
class EncodingFilter(Protocol):
    """A filter that changes which arrays travel. The receiver's `decode` reverses `encode`, up to what was lost."""

    def settings(self) -> dict[str, Any]:
        """Return the filter's name and the arguments that differ from their defaults."""
        ...

    def layout(self, layout: Layout) -> Layout:
        """Return the layout of encoded arrays. Both sides know it, and the receiver accepts nothing else.

        Args:
            layout: Layout of the arrays before encoding.

        Returns:
            Layout of the arrays that `encode` makes of them.
        """
        ...

    def encode(self, arrays: Arrays) -> Arrays:
        """Encode arrays.

        Args:
            arrays: Arrays to encode; not changed.

        Returns:
            New arrays, or the given ones where nothing changes.
        """
        ...

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Decode arrays.

        Args:
            arrays: Encoded arrays, whose names, dtypes and shapes have been checked.
            layout: Layout before encoding.

        Returns:
            Arrays of this layout, without those that the sender held back. Each is computed when it is accessed;
            accessing it raises UpdateRefusedError if `encode` cannot have made its values.
        """
        ...


class LazyArrays(Mapping[str, Array]):
    """Arrays that are computed at each access and not stored.

    Args:
        names: Names of the arrays, in order.
        make: Computes the array of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Array]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layout_of(arrays: Arrays) -> Layout:
    """Return dtype and shape of every array."""
    return {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is a real floating-point type of any width."""
    return is_floating(dtype) and dtype.kind != "c"


def work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype for differences of a tensor: float32, or its own dtype if that is wider or not real."""
    return np.dtype(np.float32) if is_real(dtype) and dtype.itemsize < 4 else dtype


def work_layout(layout: Layout) -> Layout:
    """Return a layout with every dtype replaced by that of its differences, see `work_dtype`."""
    return {name: (work_dtype(dtype), shape) for name, (dtype, shape) in layout.items()}


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite number of a real dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns (`fnmatch`, case-sensitive)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse(what: str, fix: str) -> ConfigError:
    """Make the ConfigError for wrong filter settings, to be raised by the caller."""
    return ConfigError(what, where="filters", fix=fix)


def check_number(
    owner: object, name: str, value: object, *, above: float | None = None, least: float | None = None,
    most: float | None = None, below: float | None = None,
) -> None:  # fmt: skip
    """Check that an argument is a finite number within bounds; None means no bound.

    Args:
        owner: The filter, for the error message.
        name: Name of the argument.
        value: Its value.
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound.

    Raises:
        ConfigError: If it is not.
    """
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = valid and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # an int may be larger than any float
    if valid:
        number = float(value)  # type: ignore[arg-type]
        valid = (
            (above is None or number > above)
            and (least is None or number >= least)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    if not valid:
        bounds = ((above, "above"), (least, "at least"), (most, "at most"), (below, "below"))
        limits = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None) or "finite"
        raise refuse(f"{type(owner).__name__}: {name} is {value!r}", f"give a number {limits}")


def _default(kind: type[Any], name: str) -> Any:
    return kind.__dataclass_fields__[name].default
