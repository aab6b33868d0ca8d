"""The strategy of a training that sums vectors: the model of a round is the total of the sites' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.fedavg import blocks
from fl_runtime.aggregation.spec import Described
from fl_runtime.aggregation.sums.call import Call, differing, fault_of_texts, pack_texts, packed, read_texts
from fl_runtime.capabilities import SUMS
from fl_runtime.errors import ProtocolError, RoundFailedError, StateMismatchError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, Content, ServerState, Settings, Update

ENCODING = "sums"

VALUES = "values"
"""Tensor with the values of a sum, or their total: float64, one dimension."""
CALL = "call"
"""Tensor with the `Call`: uint8, one dimension."""
SITES = "sites"
"""Extra of a result: JSON list of the sites whose values are in it."""
TEXTS = "texts"
"""Extra of an update or a result with the texts of a union."""


@dataclass(frozen=True)
class Sum(Described):
    """The sum of the sites' vectors, in float64 and in the order of the job's sites; or the union of their texts.

    Weights and numbers of examples have no effect. The result does not depend on the order of arrival. All sites of a
    round must make the same call; when that is the end of their blocks, the run is over. It has no arguments. Sites
    need the capability "sums" (`fl_adapters.sums`).

    Attributes:
        content: What updates hold: "encoded".
        initial: Where the initial model comes from: nowhere, it has no values.
        open_ended: Whether the sites decide when the run ends: yes.
        summable: Whether the sum of the updates is enough: yes, so that they may be masked.
        weighted: Whether `site_weights` of the job have an effect: no.
        scalable: Whether one site can be scaled down: no, since the total would not be one.
    """

    name: ClassVar[str] = "sum"
    content: ClassVar[Content] = "encoded"
    initial: ClassVar[Literal["first", "all", "none"]] = "none"
    open_ended: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    summable: ClassVar[bool] = True
    weighted: ClassVar[bool] = False
    scalable: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({SUMS})

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return -1 for every dimension, since each call has shapes of its own."""
        return (-1,) * len(shape)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return no settings: a task brings the result of the call before, and nothing else."""
        return {}

    def check(self, update: Update) -> None:
        """Refuse updates whose values do not fit their call."""
        where = f"update of {update.site}, round {update.round}"
        if (update.content, update.encoding) != ("encoded", ENCODING):
            raise UpdateRefusedError(
                f"the update has the content {update.content!r} in the encoding {update.encoding[:60]!r}, but the "
                "strategy sum needs the values of a sum",
                where=where,
                fix="use fl_adapters.sums at every site, and no filters that encode updates",
            )
        try:
            call, values = Call.from_array(update.arrays[CALL]), update.arrays[VALUES]
            if values.shape != (call.size,) or values.dtype != np.float64:
                raise ProtocolError("the values of a sum do not fit the shapes that it names")
            if update.extras.keys() != ({TEXTS} if call.kind == "union" else set()):
                raise ProtocolError("an update of a sum has tensors that do not belong to it")
            if call.kind == "union":
                read_texts(update.extras[TEXTS])
        except (KeyError, ProtocolError) as error:
            what = error.what if isinstance(error, ProtocolError) else "an update of a sum lacks a tensor"
            raise UpdateRefusedError(
                what, where=where, fix="use the same version of fl-adapters at every site"
            ) from None

    def finished(self, arrays: Arrays) -> bool:
        """Return whether all sites have left their blocks."""
        return arrays[CALL].size > 0 and Call.from_array(arrays[CALL]).kind == "end"

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Begin the sum of a round."""
        return _Total(allocate)

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """Return None; totals are no model, so nothing asks for one."""
        return None


class _Total:
    """The aggregator of one call."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        updates = self._updates
        if not updates:
            raise RoundFailedError("no site has sent values for this sum", fix="see the logs of the sites")
        check_same_call(updates)
        first = updates[0].arrays
        extras = {SITES: packed([update.site for update in updates])}
        if Call.from_array(first[CALL]).kind == "union":
            extras[TEXTS] = _union(updates)
        out, beside = self._allocate({VALUES: first[VALUES], CALL: first[CALL]}, extras)
        total(out[VALUES], [update.arrays[VALUES] for update in updates])
        out[CALL][...] = first[CALL]
        for name, array in extras.items():
            beside[name][...] = array
        return out, beside


def check_same_call(updates: Sequence[Update]) -> None:
    """Compare the calls of the updates of one round.

    Args:
        updates: At least one, each with a call that `Sum.check` can read.

    Raises:
        StateMismatchError: They differ.
    """
    lines = differing({update.site: Call.from_array(update.arrays[CALL]) for update in updates})
    if lines:
        raise StateMismatchError(
            "the sites do not make the same call:\n    " + "\n    ".join(lines),
            where=f"call {updates[0].round} of the block `with fl_adapters.sums(...)`",
            fix="call sum and union equally often at every site, in the same order, with the same names and shapes",
        )


def total(out: Array, parts: Sequence[Array]) -> None:
    """Sum vectors with compensation: what each addition rounds away is added at the end (Kahan-Babuska).

    Args:
        out: Receives the total, float64.
        parts: The vectors, of the same shape and dtype, in the order in which they are added.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a total that is not finite is refused later
        for block in blocks(out.size):
            rough = np.array(parts[0][block])
            lost = np.zeros_like(rough)
            for part in parts[1:]:
                added = part[block]
                new = rough + added
                back = new - rough
                lost += (rough - (new - back)) + (added - back)
                rough = new
            out[block] = rough + lost


def _union(updates: Sequence[Update]) -> Array:
    texts = {text for update in updates for text in read_texts(update.extras[TEXTS])}
    if (fault := fault_of_texts(list(texts))) is not None:
        raise StateMismatchError(fault, where="the union of all sites", fix="group the rare texts before union(...)")
    return pack_texts(texts)
