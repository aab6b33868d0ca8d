"""What a filter is: the contracts that the shipped filters keep, and the little that they share.

A filter is written down as settings, `{"name": "Quantize", "to": "int8"}`, and made of them by `make_filter`. Each
is a frozen dataclass whose fields are its arguments; what it remembers from round to round is in the object that
`open` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np

from fl_runtime.errors import ConfigError
from fl_runtime.filters.ledger import BudgetLimit
from fl_runtime.types import Array, Arrays, Settings, Task, Update, is_floating

Point = Literal["site_out", "server_in", "server_out", "site_in"]
Layout: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Tensor name -> (dtype, shape), in order."""

F = TypeVar("F", bound="FilterSettings")

AUX = "|"
"""What parts a tensor's name from that of an array which travels beside it: `w|scale`."""


@dataclass(frozen=True)
class FilterHost:
    """Where a filter runs, and where it may keep things. folder: the site's (or the server's) own; None: nowhere.

    own: the filter is asked for by the site's policy, not by the job; its budget then holds over all jobs.
    budget: of the site, over everything that is spent here, whichever filter spends it.
    shared: a folder that all sites of a simulation see; the server does not look into it.
    """

    site: str = ""
    job: str = ""
    folder: Path | None = None
    from_policy: bool = False
    budget: BudgetLimit | None = None
    shared: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What leaves beside the tensors. metrics: numbers, or what stands for a metric of all sites together."""

    metrics: Mapping[str, Any]
    num_examples: int
    local_steps: int = 0
    round: int = 0


class FilterSettings:
    """A filter's settings. points: where it may stand; the first is where it stands unless the job says `at`."""

    points: ClassVar[tuple[Point, ...]] = ("site_out",)

    def settings(self) -> dict[str, Any]:
        """Its name and the arguments that differ from the defaults."""
        shown = {name: value for name, value in asdict(self).items() if value != _default(type(self), name)}  # type: ignore[call-overload]
        return {"name": type(self).__name__, **shown}


class RunningFilter(Protocol):
    """A filter at work on updates whose content is "delta", in arrays that it may write to.

    record: what it did in the last call, for the run's history.
    """

    @property
    def record(self) -> Settings: ...
    def __call__(self, update: Update, task: Task) -> Update: ...


@runtime_checkable
class Budgeted(Protocol):
    """An opened filter that spends a budget."""

    def afford(self, round: int) -> None:
        """PrivacyBudgetError if the update of this round could not leave: known before the work is done."""
        ...


class Changing(Protocol):
    """Settings of a filter that changes the values of an update."""

    @property
    def points(self) -> tuple[Point, ...]: ...
    def settings(self) -> dict[str, Any]: ...
    def open(self, host: FilterHost) -> RunningFilter: ...


@runtime_checkable
class FactsFilter(Protocol):
    """A filter of what leaves beside the tensors: of updates and of reports alike."""

    def settings(self) -> dict[str, Any]: ...
    def facts(self, facts: Facts, host: FilterHost) -> Facts: ...


@runtime_checkable
class EncodingFilter(Protocol):
    """A filter that changes which arrays travel; `decode` on the other side undoes `encode` as far as that goes."""

    def settings(self) -> dict[str, Any]: ...

    def layout(self, layout: Layout) -> Layout:
        """What `encode` makes of arrays of this layout: known to both sides, so that nothing else is taken."""
        ...

    def encode(self, arrays: Arrays) -> Arrays:
        """New arrays, or views of the given ones where nothing changes."""
        ...

    def decode(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Arrays of `layout` (fewer, where some were held back), each made when it is asked for. UpdateRefusedError
        for what `encode` does not make."""
        ...


class LazyArrays(Mapping[str, Array]):
    """Arrays that are made one at a time, when asked for, and not kept."""

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
    return {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}


def is_real(dtype: np.dtype[Any]) -> bool:
    """Floats of any width; neither complex numbers nor integers."""
    return is_floating(dtype) and dtype.kind != "c"


def work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What a difference is held in: float32, or wider where the tensor is."""
    return np.dtype(np.float32) if is_real(dtype) and dtype.itemsize < 4 else dtype


def work_layout(layout: Layout) -> Layout:
    return {name: (work_dtype(dtype), shape) for name, (dtype, shape) in layout.items()}


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a real dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="filters", fix=fix)


def check_number(
    owner: object, name: str, value: object, *, above: float | None = None, least: float | None = None,
    most: float | None = None, below: float | None = None,
) -> None:  # fmt: skip
    """ConfigError unless `value` is a finite number within the bounds given."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if good:
        number = float(value)  # type: ignore[arg-type]
        good = (
            (above is None or number > above)
            and (least is None or number >= least)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
    if not good:
        bounds = ((above, "above"), (least, "at least"), (most, "at most"), (below, "below"))
        wanted = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None) or "finite"
        raise refuse(f"{type(owner).__name__}: {name} is {value!r}", f"give a number {wanted}")


def _default(kind: type[Any], name: str) -> Any:
    return kind.__dataclass_fields__[name].default
