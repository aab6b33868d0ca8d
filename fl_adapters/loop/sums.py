"""`sums`: sum vectors over all sites, and unite texts, from any script.

Example:
    ```python
    import numpy as np

    import fl_adapters as fl

    values = np.array([1.0, 2.0, 4.0])
    with fl.sums() as federation:
        totals = federation.sum({"count": values.size, "sum": values.sum()})
    print(totals["sum"] / totals["count"])
    ```
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np

from fl_adapters.loop.connect import finish_earlier
from fl_adapters.loop.masked_union import masked_union
from fl_adapters.loop.replay import Replay, Result
from fl_adapters.participant.identity import Site
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.results import Export
from fl_adapters.participant.session import Session
from fl_runtime.aggregation.sums.call import (
    MAX_BYTES,
    MAX_NAME_CHARS,
    MAX_NAMES,
    Call,
    differing,
    fault_of_texts,
    pack_texts,
)
from fl_runtime.aggregation.sums.strategy import CALL, ENCODING, TEXTS, VALUES, Sum
from fl_runtime.capabilities import SUMS
from fl_runtime.errors import ConfigError, ProtocolError, QuorumError, StateMismatchError
from fl_runtime.secure_sum.totals import LARGEST_INTEGER, LARGEST_VALUE, WORDS
from fl_runtime.text import METRIC_NAMES, is_metric_name
from fl_runtime.types import Array, Arrays, Task, Terms
from fl_runtime.wire.names import facts_of

_LARGEST = 1e140
"""Largest absolute value of a sum, so that the totals of all sites stay finite, and their squares too."""
_RARE = "group the rare texts before union(...)"
_LOCAL = Site("local", 0, 1, "")


def sums(
    *,
    kit: str | None = None,
    agree: Mapping[str, Any] | None = None,
    num_examples: int = 1,
    required: bool = False,
) -> Sums:
    """Sum vectors over all sites of the federation that this process belongs to.

    Every `with` block is a training of the script, with a run of its own. Without a startup kit the block runs alone:
    sums are the site's own values.

    Args:
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        agree: What must be equal at all sites, by any name: texts or numbers, and lists of them. It is compared when
            the block is entered.
        num_examples: Number of examples that this site reports, at least 1. It has no effect on the sums.
        required: Whether a missing startup kit is an error.

    Returns:
        The federation, to be used in a `with` block.

    Raises:
        ConfigError: An argument cannot work, or the kit cannot be read.

    Example:
        ```python
        import numpy as np

        import fl_adapters as fl

        with fl.sums(agree={"what": "mean of column 3"}) as federation:
            totals = federation.sum({"count": 3, "sum": np.array([1.0, 2.0, 4.0]).sum()})
        ```
    """
    facts = {
        str(name): str(value) if isinstance(value, bool | int | float | np.generic) else value
        for name, value in (agree or {}).items()
    }
    facts_of(facts)  # a mistake in it is told before anybody is called
    return Sums(Options(kit=kit, num_examples=num_examples, required=required), facts)


class Sums:
    """The sites of a federation, as a script sums over them. Returned by `sums`.

    All sites make the same calls in the same order. Leaving the block waits until all sites have left theirs; leaving
    it with an exception leaves the run.

    Args:
        options: The checked arguments of `sums`.
        facts: What must be equal at all sites, by name.

    Attributes:
        site: Name, index, count and job of this site; outside a federation "local", 0, 1 and "".
        sites_in_last_sum: Names of the sites whose values are in the result of the last call, in the job's order.

    Example:
        ```python
        import numpy as np

        import fl_adapters as fl

        colours = ["red", "green", "red"]
        with fl.sums() as federation:
            names = federation.union(colours)
            counts = federation.sum({name: colours.count(name) for name in names})
        ```
    """

    def __init__(self, options: Options, facts: Mapping[str, Any]) -> None:
        self.site = _LOCAL
        self.sites_in_last_sum: tuple[str, ...] = ()
        self._options, self._facts = options, facts
        self._session: Session | None = None
        self._replay = Replay(None)
        self._task: Task | None = None
        self._in_block = False
        self._export: Export | None = None
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> Sums:
        if self._in_block:
            raise ConfigError("this block is open already", where="fl_adapters.sums", fix="call sums() for each block")
        finish_earlier(self._options.kit)
        self._session = session = open_session(self._options, framework=SUMS, fresh=True)
        if session is not None:
            self.site = session.site
            try:
                self._begin(session)
            except BaseException as error:
                self._replay.close()
                session.leave(error)
                raise
        self._in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._in_block = False
        with contextlib.closing(self._replay):
            self._leave_block(error)
        return False

    def _leave_block(self, error: BaseException | None) -> None:
        session = self._session
        if session is None or session.closed:
            return
        if error is not None:
            session.leave(error)
            return
        try:
            self._end(session)
        except BaseException as failure:
            session.leave(failure)
            raise

    def sum(self, values: Mapping[str, Any], *, integers: bool = False) -> dict[str, Array]:
        """Sum arrays over all sites. All sites call it with the same names and shapes.

        Args:
            values: Name -> a number or an array of real numbers, of any shape and at most 128 MiB together as float64.
                They must be finite and at most 1e140. Integers must be below 2^53. Borrowed for the call.
            integers: Whether all values are whole numbers, the same at all sites. Masked, they then take 8 bytes each
                in place of 32. Floats that are whole numbers will do.

        Returns:
            Name -> the total, float64, with the shape of the value; in the order of `values`. The caller owns them. The
            totals have the same bits at every site.

        Raises:
            ConfigError: The values are not such numbers, or the call is outside the `with` block.
            StateMismatchError: The sites name other arrays, or arrays of other shapes. Raised at every site.
            QuorumError: The others have gone on without this site, so that it cannot get the total.

        Example:
            ```python
            import numpy as np

            import fl_adapters as fl

            rows = np.array([[1.0, 2.0], [3.0, 4.0]])
            with fl.sums() as federation:
                totals = federation.sum({"count": len(rows), "gram": rows.T @ rows})
            ```
        """
        arrays = _checked(values, masked=self._masked and not integers)
        if integers:
            _check_integers(arrays)
        call = Call("sum", tuple((name, array.shape) for name, array in sorted(arrays.items())), bool(integers))
        flat = [array.reshape(-1) for _, array in sorted(arrays.items())]
        vector = np.concatenate(flat) if flat else np.empty(0)
        result = self._exchange(call, vector, {})
        parts: dict[str, Array] = {}
        start = 0
        for name, shape in call.shapes:
            size = arrays[name].size
            parts[name] = result.values[start : start + size].reshape(shape).copy()
            start += size
        return {name: parts[name] for name in arrays}

    def union(self, texts: Iterable[str]) -> list[str]:
        """Unite texts over all sites, such as categories. All sites, and the server, see them.

        Args:
            texts: At most 100,000 texts of at most 1,000 characters each.

        Returns:
            The distinct texts of all sites, sorted by code point.

        Raises:
            ConfigError: These are not such texts, or the call is outside the `with` block.
            StateMismatchError: Other sites call something else. Raised at every site.
            QuorumError: The others have gone on without this site, so that it cannot get the union.
        """
        if isinstance(texts, str):
            raise ConfigError(f"union({texts!r}) got a text", where="union", fix="pass a list of texts")
        own = list(texts)
        wrong = next((text for text in own if not isinstance(text, str)), None)
        if wrong is not None:
            raise ConfigError(
                f"union got {wrong!r}, a {type(wrong).__name__}", where="union", fix="pass texts, such as str(value)"
            )
        own = sorted({str(text) for text in own})
        if (fault := fault_of_texts(own)) is not None:
            raise ConfigError(fault, where="union", fix=_RARE)
        if self._masked:
            return self._masked_union(own)
        return list(self._exchange(Call("union"), np.empty(0), {TEXTS: pack_texts(own)}, own).texts)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Report metrics for the history of the run; they leave with the next call, or with the end of the block.

        In masked sums they are not masked, and must be the same at all sites: report what is computed from totals.

        Args:
            metrics: Name -> number. Those that are not finite are left out.

        Raises:
            ConfigError: A name is no name of a metric.
        """
        wrong = next((name for name in metrics if not is_metric_name(str(name))), None)
        if wrong is not None:
            raise ConfigError(f"{wrong!r} is no name of a metric", where="report", fix=f"use {METRIC_NAMES}")
        self._metrics |= {str(name): float(value) for name, value in metrics.items() if math.isfinite(value)}

    def leave_model(self, export: Export) -> None:
        """Let the run end with a model that this script has made of the sums, the same at all sites.

        In a simulation one site writes it to runs/<job>/model, in a federation each site to its own folder of the job.

        Args:
            export: Writes the model to the folder that it gets. It is called when the block is left.
        """
        self._export = export

    @property
    def _masked(self) -> bool:
        """Whether the values leave this site masked, so that the server sees the totals alone."""
        return self._session is not None and self._session.settings.secure_sum

    def _masked_union(self, own: list[str]) -> list[str]:
        """Return the union of texts, of which the server sees no site's own."""
        found = masked_union(partial(self.sum, integers=True), own)
        if (fault := fault_of_texts(found)) is not None:
            raise StateMismatchError(fault, where="the union of all sites", fix=_RARE)
        return found

    def _begin(self, session: Session) -> None:
        """Agree with the other sites, and receive the first task."""
        state: Arrays = {VALUES: np.empty(0), CALL: np.empty(0, np.uint8)}
        session.register(
            state,
            agreement=facts_of(self._facts),
            rounds=None,
            evaluates=False,
            capabilities=frozenset({SUMS}),
            terms=Terms(content="encoded", strategy=Sum().spec),
            encoding=ENCODING,
        )
        self._replay = Replay(session.home.folder / "sums.bin", fresh=session.home.fresh)
        self._task = session.start(lambda: state)
        self._replay.learn(self._task)

    def _exchange(self, call: Call, values: Array, extras: Arrays, texts: list[str] | None = None) -> Result:
        """Make a call together with the other sites."""
        if not self._in_block:
            raise ConfigError(
                "sum and union need an open block",
                where="fl_adapters.sums",
                fix="call them within `with fl_adapters.sums() as federation:`",
            )
        session = self._session
        if session is None:
            self.sites_in_last_sum = (self.site.name,)
            return Result(call, values, tuple(texts or ()), self.sites_in_last_sum)
        number = self._replay.next_number()
        if session.closed:
            raise ConfigError(f"{self.site.name} has left the run", where=f"call {number}", fix="open another block")
        try:
            if not self._replay.knows(number):
                self._send(session, number, call, values, extras)
            result = self._replay.result(number)
            lines = differing({"the other sites": result.call, self.site.name: call})
            if lines:
                raise StateMismatchError(
                    "this site does not make the call that it made before:\n    " + "\n    ".join(lines),
                    where=f"call {number} of {self.site.name}",
                    fix="let the script make the same calls whenever it is started",
                )
        except BaseException as error:
            session.leave(error)
            raise
        self.sites_in_last_sum = result.sites
        return result

    def _send(self, session: Session, number: int, call: Call, values: Array, extras: Arrays) -> None:
        """Send this site's part of a call, and receive the result."""
        task = self._current()
        if task.kind != "train":
            raise ProtocolError(f"the run ended before call {number}", where=self.site.name, fix="see the server's log")
        if task.round != number:
            raise _missed(self.site.name, number, task.round)
        result = LocalResult(self._options.num_examples or 1, 0, self._metrics)
        self._metrics = {}
        session.submit({VALUES: values, CALL: call.to_array()}, result, extras=extras)
        self._task = session.next_task()
        self._replay.learn(self._task)
        if not self._replay.knows(number):
            raise _missed(self.site.name, number, self._current().round)

    def _end(self, session: Session) -> None:
        """Leave the block together with the other sites."""
        call = Call("end")
        while self._current().kind == "train":
            number = self._replay.next_number()
            if not self._replay.knows(number):
                self._send(session, number, call, np.empty(0), {})
            elif (found := self._replay.result(number).call) != call:
                raise StateMismatchError(
                    f"this site leaves its block where it has called {found.kind}(...) before",
                    where=f"call {number} of {self.site.name}",
                    fix="let the script make the same calls whenever it is started",
                )
        session.finish(self._export, has_model=self._export is not None)

    def _current(self) -> Task:
        return cast(Task, self._task)


def _missed(site: str, number: int, current: int) -> QuorumError:
    return QuorumError(
        f"{site} has no result of call {number}: the other sites went on without it, and are at call {current}",
        where="fl_adapters.sums",
        fix="start the job again with all sites, or let it wait for all of them (min_sites, deadline_s)",
    )


def _checked(values: object, *, masked: bool) -> dict[str, Array]:
    """Return the values as float64 arrays. Raises ConfigError, which names the first that cannot be summed."""
    most_bytes, largest = (MAX_BYTES // WORDS, LARGEST_VALUE) if masked else (MAX_BYTES, _LARGEST)
    where = "sum(...)"
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"sum got a {type(values).__name__}, not a dict", where=where, fix='name each value, as in {"count": n}'
        )
    if len(values) > MAX_NAMES:
        raise ConfigError(f"sum got {len(values)} names; the limit is {MAX_NAMES}", where=where, fix="use arrays")
    arrays = {name: _as_float64(name, value, largest) for name, value in values.items()}
    nbytes = sum(array.nbytes for array in arrays.values())
    if nbytes > most_bytes:
        raise ConfigError(
            f"sum got {nbytes} bytes of numbers; the limit is {most_bytes}",
            where=where,
            fix="sum them in several calls",
        )
    return arrays


def _check_integers(arrays: Mapping[str, Array]) -> None:
    """Raise ConfigError if a value is not a whole number below 2^53."""
    for name, array in arrays.items():
        wrong = array[(array != np.rint(array)) | (np.abs(array) >= LARGEST_INTEGER)]
        if wrong.size:
            raise ConfigError(
                f"{name!r} holds {wrong.flat[0]:g}, which is no whole number below 2^53",
                where="sum(..., integers=True)",
                fix="leave integers out, or round the values",
            )


def _as_float64(name: object, value: object, most: float) -> Array:
    where = "sum(...)"
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ConfigError(
            f"{name!r} is no name of an array",
            where=where,
            fix=f"use a printable text of at most {MAX_NAME_CHARS} characters",
        )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name!r} is a {type(value).__name__} that NumPy cannot read: {error}", where=where, fix="pass an array"
        ) from None
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name!r} has the dtype {array.dtype}, which has no sum in float64", where=where, fix="pass real numbers"
        )
    if array.dtype.kind in "iu" and array.size and max(int(array.max()), -int(array.min())) >= LARGEST_INTEGER:
        raise ConfigError(
            f"{name!r} has an integer of 2^53 or more, which float64 does not hold exactly",
            where=where,
            fix="pass floats if rounding does no harm",
        )
    array = array.astype(np.float64)
    largest = float(np.abs(array).max()) if array.size else 0.0
    if not math.isfinite(largest):
        raise ConfigError(
            f"{name!r} holds values that are not finite", where=where, fix="leave out or replace NaN and infinity first"
        )
    if largest > most:
        raise ConfigError(
            f"{name!r} holds {largest:.3g}, and values of sums go up to {most:g}", where=where, fix="rescale it"
        )
    return array
