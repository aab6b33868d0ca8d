"""One call of a script that all sites make together, as it travels: a sum, a union, or the end of the block.

It is JSON in a uint8 tensor beside the values, so that the values hold numbers alone and may be masked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fl_runtime.errors import ProtocolError, StateMismatchError
from fl_runtime.text import parse_json
from fl_runtime.types import Array

MAX_BYTES = 2**27
"""Largest size of the values of one sum: 16 million numbers."""
MAX_NAMES = 10_000
"""Most names in one sum."""
MAX_NAME_CHARS = 200
MAX_TEXTS = 100_000
"""Most texts in a union, of one site and of all sites together."""
MAX_TEXT_CHARS = 1_000
_MAX_CALL_CHARS = 2**23
_MAX_TEXTS_CHARS = 2**26
_MAX_DIMENSIONS = 32
_SHORT_BYTES = 4_096
_LISTED = 8

CallKind = Literal["sum", "union", "end"]


@dataclass(frozen=True)
class Call:
    """What a site calls in a round.

    Attributes:
        kind: "sum" of named arrays, "union" of texts, or "end": the site leaves its block and sums no more.
        shapes: Name -> shape of each array of a sum, in the order in which they follow each other in the values.
        integers: Whether all values of a sum are whole numbers below 2^53, at every site.
        metrics: Name and value of what a site reports beside masked values. All sites know these numbers already.
    """

    kind: CallKind
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    integers: bool = False
    metrics: tuple[tuple[str, float], ...] = ()

    @property
    def size(self) -> int:
        """Number of values of all arrays."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def to_array(self) -> Array:
        """Return the call as a uint8 tensor."""
        fields: dict[str, Any] = {"kind": self.kind, "shapes": [[name, list(shape)] for name, shape in self.shapes]}
        fields |= {"integers": True} if self.integers else {}
        fields |= {"metrics": [[name, value] for name, value in self.metrics]} if self.metrics else {}
        return packed(fields)

    @classmethod
    def from_array(cls, array: Array) -> Call:
        """Read a call that another participant has sent.

        Args:
            array: The tensor of `to_array`.

        Returns:
            The call. Its names are printable.

        Raises:
            ProtocolError: The tensor holds no call, or more than the limits allow.
        """
        data = array.tobytes()
        return _read_short(data) if len(data) <= _SHORT_BYTES else _read(data)


def differing(calls: Mapping[str, Call]) -> list[str]:
    """Compare the calls of one round.

    Args:
        calls: Site -> its call; at least one.

    Returns:
        A line for each difference to the call that most sites make; none if all make the same.
    """
    counts = {call: list(calls.values()).count(call) for call in calls.values()}
    usual = max(counts, key=lambda call: counts[call])  # the first of several that are as frequent
    base = next(site for site, call in calls.items() if call == usual)
    lines = [f"{site}: {line}" for site, call in calls.items() for line in _differences(usual, base, call)]
    return [*lines[:_LISTED], *([f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])]


def common_metrics(calls: Mapping[str, Call]) -> dict[str, float]:
    """Return the metrics that all sites of a round report.

    Args:
        calls: Site -> its call; at least one.

    Raises:
        StateMismatchError: Two sites report different values of one metric.
    """
    (base, first), *others = calls.items()
    found = dict(first.metrics)
    for site, call in others:
        theirs = dict(call.metrics)
        found = {name: value for name, value in found.items() if name in theirs}
        wrong = next((name for name, value in found.items() if theirs[name] != value), None)
        if wrong is not None:
            raise StateMismatchError(
                f"{site} reports {wrong}={theirs[wrong]!r}, and {base} {found[wrong]!r}",
                where="fl_adapters.sums",
                fix="report what is computed from totals, which are the same at every site",
            )
    return found


def packed(value: object) -> Array:
    """Return a JSON value as a uint8 tensor."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def pack_texts(texts: Iterable[str]) -> Array:
    """Return texts as a uint8 tensor: sorted, each once."""
    return packed(sorted(set(texts)))


def read_texts(array: Array) -> list[str]:
    """Read texts that another participant has sent.

    Args:
        array: The tensor of `pack_texts`.

    Returns:
        The texts.

    Raises:
        ProtocolError: They are no texts, too many, or too long.
    """
    try:
        texts = parse_json(array.tobytes(), limit_chars=_MAX_TEXTS_CHARS)
    except ValueError as error:
        raise ProtocolError(f"the texts of a union cannot be read: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ProtocolError("the texts of a union are not a list of texts")
    if (fault := fault_of_texts(texts)) is not None:
        raise ProtocolError(fault)
    return texts


def fault_of_texts(texts: Sequence[str]) -> str | None:
    """Return why these texts cannot be in a union, or None if they can."""
    if len(texts) > MAX_TEXTS:
        return f"a union has {len(texts)} texts; the limit is {MAX_TEXTS}"
    if any(len(text) > MAX_TEXT_CHARS for text in texts):
        return f"a text of a union has more than {MAX_TEXT_CHARS} characters"
    if (broken := next((text for text in texts if not _is_unicode(text)), None)) is not None:
        return f"a text of a union cannot be encoded in UTF-8: {broken[:50]!r}"
    return None


def _read(data: bytes) -> Call:
    """Read a call from its JSON."""
    try:
        fields = parse_json(data, limit_chars=_MAX_CALL_CHARS)
        kind, shapes, integers = fields["kind"], fields["shapes"], fields.get("integers", False)
        if kind not in ("sum", "union", "end") or len(shapes) > MAX_NAMES or (kind != "sum" and shapes):
            raise ValueError("its kind or its number of arrays is wrong")
        if not isinstance(integers, bool):
            raise ValueError("it does not say whether its values are integers")
        metrics = tuple((_name(name), _metric(value)) for name, value in fields.get("metrics", []))
        call = Call(kind, tuple((_name(name), _shape(shape)) for name, shape in shapes), integers, metrics)
        if len(metrics) > MAX_NAMES:
            raise ValueError("it has too many metrics")
        if len(dict(call.shapes)) != len(shapes) or call.size * 8 > MAX_BYTES:
            raise ValueError("a name is given twice, or the arrays are too large")
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"a site's call of a sum cannot be read: {error}") from None
    return call


_read_short = lru_cache(maxsize=64)(_read)  # the same call is read for each site, and several times for each


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _differences(usual: Call, base: str, call: Call) -> list[str]:
    """How a call differs from the one that most sites make, of which `base` is the first."""
    if call.kind != usual.kind:
        return [f"{_DONE[call.kind]}, but {base} {_DONE[usual.kind]}"]
    if call.integers != usual.integers:
        return [f"passes integers={call.integers}, but {base} integers={usual.integers}"]
    mine, theirs = dict(call.shapes), dict(usual.shapes)
    return [
        f"{name!r} is {_shown(mine, name)}, but {_shown(theirs, name)} at {base}"
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name)
    ]


_DONE = {"sum": "calls sum(...)", "union": "calls union(...)", "end": "has left its block"}


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"of shape {list(shapes[name])}" if name in shapes else "missing"


def _name(name: Any) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ValueError("a name of an array is not a printable text")
    return name


def _metric(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a metric is not a finite number")
    return float(value)


def _shape(shape: Any) -> tuple[int, ...]:
    whole = all(type(length) is int and 0 <= length <= MAX_BYTES for length in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a shape of an array is not one")
    return tuple(shape)
