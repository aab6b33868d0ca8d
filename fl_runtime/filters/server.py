"""The server's two points: what sites have encoded is decoded, checked and filtered before it is summed; the global
model is encoded before it is handed out.

An update names what ran on it in `Update.encoding`, a JSON list in the order in which it ran, so each can be decoded
by itself, whatever the policies of the sites. Decoding depends on the update alone and sums run in a fixed order:
the bits do not depend on the order of arrival.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fl_runtime.errors import FederationError, ProtocolError, UpdateRefusedError
from fl_runtime.filters import MAX_FILTERS, at_point, encodings, make_filter
from fl_runtime.filters.base import (
    EncodingFilter,
    FilterHost,
    Layout,
    LazyArrays,
    RunningFilter,
    layout_of,
    work_dtype,
    work_layout,
)
from fl_runtime.filters.ckks import CiphertextMean, HomomorphicCKKS, check_ciphertexts, named_in
from fl_runtime.filters.gaussian import GaussianDP, NoisyMean
from fl_runtime.filters.ledger import Ledger, need_accounting
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, Settings, Strategy, Task, Update, is_floating

_ENCODING_NAMES = ("ExcludeVars", "Quantize", "TopK")
_MAX_CHARS, _MAX_CHAIN = 2**16, 8


def applied_filters(encoding: str) -> tuple[Settings, ...]:
    """The settings of the filters that an update names; none for an encoding of an adapter's own."""
    return _ran(encoding)[0]


def update_layout(agreed: Layout, content: str, encoding: str, encrypted: HomomorphicCKKS | None = None) -> Layout:
    """The arrays that an update of this content and encoding must consist of. encrypted: how the job encrypts.

    ProtocolError for a bad encoding, UpdateRefusedError for one that is not encrypted as the job says.
    """
    named = [settings for settings in applied_filters(encoding) if named_in(settings)]
    if encrypted is not None or named:
        if encrypted is None or named != [encrypted.settings()] or content != "encoded":
            said = encrypted.settings() if encrypted else "not at all"
            raise UpdateRefusedError(
                f"an update of content {content!r} is encrypted with {named}; the job says {said}",
                fix="run the same version of fl-adapters at every site",
            )
        return encrypted.layout(agreed)
    chain = _ran(encoding)[1]
    layout = work_layout(agreed) if encodings(chain) else agreed
    if bool(encodings(chain)) != (content == "encoded"):
        raise ProtocolError(f"an update of content {content!r} names other filters: {encoding[:200]!r}")
    for item in chain:
        layout = item.layout(layout)
    return layout


def is_filtered(update: Update) -> bool:
    """Whether an update has to be decoded: differences, encoded by our filters, or with tensors held back."""
    return update.content == "delta" or bool(_ran(update.encoding)[1])


def decoded(update: Update, base: Arrays) -> Update:
    """The update as weights. Its arrays are made one at a time when asked for, floats in float32 or wider; those that
    the site held back are missing."""
    if not is_filtered(update):
        return update
    given, chain = update.arrays, _ran(update.encoding)[1]
    layouts = [work_layout(layout_of(base)) if encodings(chain) else layout_of(base)]
    for item in chain[:-1]:
        layouts.append(item.layout(layouts[-1]))
    for item, before in zip(reversed(chain), reversed(layouts), strict=True) if chain else ():
        given = item.decode(given, before)

    def weights(name: str) -> Array:
        array = given[name]
        if update.content == "weights" or not is_floating(base[name].dtype):
            return array
        return np.add(base[name], array, dtype=work_dtype(base[name].dtype), casting="unsafe")

    return replace(update, arrays=LazyArrays(given, weights), content="weights", encoding="")


class ServerFilters:
    """The filters that the job has at the server, and the decoding of what those at the sites have done."""

    def __init__(self, filters: Sequence[Settings], host: FilterHost) -> None:
        self._outgoing = encodings(at_point(filters, "server_out"))
        incoming = at_point(filters, "server_in")
        self._incoming: list[RunningFilter] = [item.open(host) for item in incoming if not isinstance(item, GaussianDP)]
        self._central = next((item for item in incoming if isinstance(item, GaussianDP)), None)
        self._host = host
        self.encrypted: HomomorphicCKKS | None = next(
            (item for item in at_point(filters, "site_out") if isinstance(item, HomomorphicCKKS)), None
        )
        self._context = self.encrypted.public_context() if self.encrypted else None
        if self._central is not None:
            need_accounting()
            self._ledger = Ledger(host.folder)

    def afford(self, round: int) -> None:
        """PrivacyBudgetError if the server's own budget does not allow another round."""
        if self._central is not None:
            limits = self._central.limits(self._host)
            self._ledger.afford(self._host.job, round, [self._central.mechanism], limits)

    def aggregator(
        self, make: Callable[[Allocate], Aggregator], base: Arrays, allocate: Allocate, *, linear: bool
    ) -> Aggregator:
        """A round's sum of updates as they came. make: the strategy's own aggregator, with the `allocate` it gets.
        linear: as the strategy says."""
        if self.encrypted is not None:
            return CiphertextMean(self.encrypted, self._context, allocate)
        if self._central is None:
            return _Filtered(make, base, allocate, self._incoming, linear=linear)
        noisy = NoisyMean(self._central, self._ledger, self._host, base, allocate)
        return _Filtered(lambda _: noisy, base, allocate, self._incoming, differences=True)

    def check(self, update: Update, base: Arrays, finite: Callable[[Arrays], None], strategy: Strategy) -> None:
        """Decode everything once, before the update counts, and let the strategy see it as it will be summed.

        Raises what decoding, `finite` or the strategy raises.
        """
        if self.encrypted is not None:
            if update.extras:
                raise UpdateRefusedError("tensors beside the encrypted weights", where=f"update of {update.site}")
            check_ciphertexts(update, self.encrypted, self._context)
            return
        if is_filtered(update):
            if not base:
                raise UpdateRefusedError("the first model must be weights as they are", where=f"site {update.site}")
            update = decoded(update, base)
            for name in update.arrays:
                finite({name: update.arrays[name]})
        strategy.check(update)

    def encode_global_model(self, arrays: Arrays) -> Arrays | None:
        """The global model as it travels to the sites for a round of training; None: as it is."""
        if not self._outgoing:
            return None
        for item in self._outgoing:
            arrays = item.encode(arrays)
        return arrays


class _Filtered:
    """Feeds decoded updates to the strategy's aggregator.

    A tensor that a site has held back does not count in a mean; a strategy that needs all of them sees it unchanged.
    """

    def __init__(
        self,
        make: Callable[[Allocate], Aggregator],
        base: Arrays,
        allocate: Allocate,
        filters: Sequence[RunningFilter],
        *,
        linear: bool = True,
        differences: bool = False,
    ) -> None:
        """linear: the aggregator is a running mean, which does not look at an update again. differences: it takes
        these, and no weights."""
        self._linear, self._differences = linear, differences
        self._base, self._allocate, self._filters = base, allocate, filters
        self._inner = make(self._allocated)
        self._decoding = False
        self._given: set[str] = set()
        self._work: dict[str, Array] = {}

    def add(self, update: Update) -> None:
        filtered = is_filtered(update)
        self._decoding |= filtered or bool(self._filters)
        update = decoded(update, self._base)
        if self._filters or self._differences:
            update = self._changed(update)
        self._given.update(update.arrays)
        if filtered and not self._linear and update.arrays.keys() != self._base.keys():
            mine = update.arrays
            whole = LazyArrays(self._base, lambda name: mine[name] if name in mine else self._base[name])
            update = replace(update, arrays=whole)
        self._inner.add(update)

    def result(self) -> tuple[Arrays, Arrays]:
        arrays, extras = self._inner.result()
        if self._decoding and not self._differences:
            for name in arrays.keys() - self._given:  # every site held it back
                arrays[name][...] = self._base[name]
        return arrays, extras

    def _allocated(self, arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        """Decoded updates are wider than the model, and may lack tensors: the next model is as the one before."""
        return self._allocate(self._base if self._decoding else arrays, extras)

    def _changed(self, update: Update) -> Update:
        """The filters of `server_in`, on the differences."""
        task = Task(update.job, update.round, update.stage, "train", update.base_version, self._base)
        found = {}
        for name in update.arrays:
            dtype = work_dtype(self._base[name].dtype)
            out = self._work.get(name)
            if out is None or not self._linear:  # what may be looked at again is not overwritten
                out = self._work[name] = np.empty(self._base[name].shape, dtype)
            if is_floating(dtype):
                np.subtract(update.arrays[name], self._base[name], out=out, dtype=dtype, casting="unsafe")
            else:
                out[...] = update.arrays[name]
            found[name] = out
        update = replace(update, arrays=found, content="delta")
        for change in self._filters:
            update = change(update, task)
        return update if self._differences else decoded(update, self._base)


@lru_cache(maxsize=256)
def _ran(encoding: str) -> tuple[tuple[Settings, ...], tuple[EncodingFilter, ...]]:
    """(everything that ran, the part of it that has to be undone) of an encoding that comes from a site."""
    if not encoding.startswith("["):
        return (), ()
    try:
        found = json.loads(encoding)
        if len(encoding) > _MAX_CHARS or len(found) > MAX_FILTERS or not all(isinstance(x, dict) for x in found):
            raise ProtocolError("an update names its filters in a way that cannot be read")
        chain = []
        for settings in found:
            if settings.get("name") in _ENCODING_NAMES:
                arguments = {name: value for name, value in settings.items() if name != "site"}
                chain.append(make_filter(arguments))
        if len(chain) > _MAX_CHAIN:
            raise ProtocolError(f"an update names {len(chain)} encodings; the limit is {_MAX_CHAIN}")
    except (ValueError, TypeError, RecursionError, FederationError) as error:
        raise ProtocolError(f"an update names filters that cannot be read: {error}") from None
    return tuple(found), tuple(chain)
