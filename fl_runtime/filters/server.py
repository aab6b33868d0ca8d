"""Filters at the server: decode and filter updates before aggregation, and encode the global model.

An update lists the filters that were applied to it in `Update.encoding`: a JSON list of their settings, in order. So
each update can be decoded by itself, whatever the policies of the sites. Decoding depends on the update alone, and sums
have a fixed order: the result does not depend on the order of arrival.
"""

from __future__ import annotations

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
from fl_runtime.filters.feedback import advanced, decode_chain, difference_to
from fl_runtime.filters.gaussian import GaussianDP, NoisyMean
from fl_runtime.text import parse_json
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, Settings, Strategy, Task, Update, is_floating

_ENCODING_NAMES = ("ExcludeVars", "Quantize", "TopK")
_MAX_CHARS, _MAX_CHAIN = 2**16, 8


def applied_filters(encoding: str) -> tuple[Settings, ...]:
    """Return the settings of the filters that were applied to an update.

    Args:
        encoding: `Update.encoding`.

    Returns:
        The settings in order; empty for an adapter's own encoding.

    Raises:
        ProtocolError: If the list cannot be read.
    """
    return _parsed(encoding)[0]


def update_layout(agreed: Layout, content: str, encoding: str, encrypted: HomomorphicCKKS | None = None) -> Layout:
    """Return the layout that the arrays of an update must have.

    Args:
        agreed: Layout of the weights, as agreed at the handshake.
        content: `Update.content`.
        encoding: `Update.encoding`.
        encrypted: The job's encryption, or None.

    Returns:
        Layout of the update's arrays as they travel.

    Raises:
        ProtocolError: If the encoding cannot be read or does not fit the content.
        UpdateRefusedError: If the update is not encrypted as the job demands.
    """
    encryption = [settings for settings in applied_filters(encoding) if named_in(settings)]
    if encrypted is not None or encryption:
        if encrypted is None or encryption != [encrypted.settings()] or content != "encoded":
            expected = encrypted.settings() if encrypted else "no encryption"
            raise UpdateRefusedError(
                f"an update of content {content!r} is encrypted with {encryption}, but the job demands {expected}",
                fix="install the same version of fl-adapters at every site",
            )
        return encrypted.layout(agreed)
    chain = _parsed(encoding)[1]
    layout = work_layout(agreed) if encodings(chain) else agreed
    if bool(encodings(chain)) != (content == "encoded"):
        raise ProtocolError(f"an update of content {content!r} lists filters that do not fit it: {encoding[:200]!r}")
    for item in chain:
        layout = item.layout(layout)
    return layout


def is_filtered(update: Update) -> bool:
    """Whether an update must be decoded: it holds differences, is encoded, or lacks tensors that were held back."""
    return update.content == "delta" or bool(_parsed(update.encoding)[1])


def decoded(update: Update, base: Arrays, held: Arrays | None = None) -> Update:
    """Decode an update to weights.

    Args:
        update: The update as it arrived.
        base: The global model that the site trained from.
        held: That model as the site holds it, if it was encoded on its way. The site's change to it is then applied to
            `base`, so that the server loses nothing of its exact model. None if the site holds `base`.

    Returns:
        An update with content "weights". Its arrays are computed at each access, floats in float32 or wider; arrays
        that the site held back are missing.
    """
    if not is_filtered(update) and held is None:
        return update
    chain, layout = _parsed(update.encoding)[1], layout_of(base)
    arrays = decode_chain(chain, update.arrays, work_layout(layout) if encodings(chain) else layout)

    def weights(name: str) -> Array:
        array, dtype = arrays[name], work_dtype(base[name].dtype)
        if not is_floating(dtype) or (update.content == "weights" and held is None):
            return array
        if update.content == "weights" and held is not None:
            array = np.subtract(array, held[name], dtype=dtype, casting="unsafe")
        return np.add(base[name], array, dtype=dtype, casting="unsafe")

    return replace(update, arrays=LazyArrays(arrays, weights), content="weights", encoding="")


class ServerFilters:
    """The server's filters in one job.

    Args:
        filters: Settings of all filters of the job.
        host: The server.

    Attributes:
        encrypted: The job's encryption, or None.

    Raises:
        ConfigError: If a filter cannot be made, or a package that it needs is missing.
    """

    def __init__(self, filters: Sequence[Settings], host: FilterHost) -> None:
        self._outgoing = encodings(at_point(filters, "server_out"))
        incoming = at_point(filters, "server_in")
        self._incoming: list[RunningFilter] = [item.open(host) for item in incoming if not isinstance(item, GaussianDP)]
        self._central = next((item for item in incoming if isinstance(item, GaussianDP)), None)
        self.encrypted: HomomorphicCKKS | None = next(
            (item for item in at_point(filters, "site_out") if isinstance(item, HomomorphicCKKS)), None
        )
        self._context = self.encrypted.public_context() if self.encrypted else None
        self._releases = self._central.releases(host) if self._central is not None else None

    def afford(self, round: int) -> None:
        """Check the server's own privacy budget before a round.

        Args:
            round: The round to be opened.

        Raises:
            PrivacyBudgetError: If the round would exceed it.
        """
        if self._releases is not None:
            self._releases.afford(round)

    def spent(self) -> Settings:
        """Return what the server's own noise has cost so far.

        Returns:
            Name of the filter, epsilon spent, and its delta, as JSON values; empty without noise at the server.
        """
        if self._central is None or self._releases is None:
            return {}
        delta = self._central.delta
        return {"filter": "GaussianDP", "spent": round(self._releases.spent(delta), 6), "delta": delta}

    def aggregator(
        self,
        make: Callable[[Allocate], Aggregator],
        base: Arrays,
        allocate: Allocate,
        *,
        linear: bool,
        partial: bool = True,
        held: Arrays | None = None,
    ) -> Aggregator:
        """Make the aggregator of a round, which takes updates as they arrived.

        Args:
            make: Makes the strategy's aggregator, given the function that allocates the next global model.
            base: The global model of this round.
            allocate: Makes the arrays of the next global model.
            linear: Whether the strategy needs only the weighted mean of the updates.
            partial: Whether the strategy takes updates that lack tensors.
            held: The global model as the sites hold it, if it was encoded on its way; see `decoded`.

        Returns:
            An aggregator that decodes and filters each update before the strategy's aggregator takes it.
        """
        if self.encrypted is not None:
            return CiphertextMean(self.encrypted, self._context, allocate)
        if self._central is None or self._releases is None:
            return _Filtered(make, base, allocate, self._incoming, linear=linear, partial=partial, held=held)
        noisy = NoisyMean(self._central, self._releases, base, allocate)
        return _Filtered(lambda _: noisy, base, allocate, self._incoming, differences=True, held=held)

    def check(
        self,
        update: Update,
        base: Arrays,
        finite: Callable[[Arrays], None],
        strategy: Strategy,
        *,
        held: Arrays | None = None,
    ) -> None:
        """Check an update before it is accepted: decode all of it, and let the strategy check the result.

        Args:
            update: The update as it arrived.
            base: The global model that the site trained from; empty for an initial model.
            finite: Raises for arrays that hold NaN or infinite values.
            strategy: The job's strategy.
            held: The global model as the site holds it; see `decoded`.

        Raises:
            UpdateRefusedError: If the update cannot be decoded, is not finite, or the strategy refuses it.
        """
        if self.encrypted is not None:
            if update.extras:
                raise UpdateRefusedError(
                    "the update has unencrypted tensors beside the encrypted weights", where=f"update of {update.site}"
                )
            check_ciphertexts(update, self.encrypted, self._context)
            return
        if is_filtered(update) or held is not None:
            if not base:
                raise UpdateRefusedError("the initial model must not be filtered", where=f"site {update.site}")
            update = decoded(update, base, held)
            for name in update.arrays:
                finite({name: update.arrays[name]})
        strategy.check(update)

    @property
    def counts_equally(self) -> bool:
        """Whether a filter at `server_in` gives every update the same weight, whatever the strategy says."""
        return self._central is not None

    @property
    def encodes_model(self) -> bool:
        """Whether a filter at `server_out` encodes the global model."""
        return bool(self._outgoing)

    def encode_difference(self, arrays: Arrays, held: Arrays) -> Arrays:
        """Encode the difference between the global model and what the sites hold.

        Args:
            arrays: The global model.
            held: What the sites hold.

        Returns:
            The arrays to send.
        """
        encoded: Arrays = difference_to(held, arrays)
        for item in self._outgoing:
            encoded = item.encode(encoded)
        return encoded

    def decode_difference(self, encoded: Arrays, held: Arrays) -> dict[str, Array]:
        """Compute what the sites hold after they have received a difference.

        Args:
            encoded: What `encode_difference` returned.
            held: What the sites hold before.

        Returns:
            New arrays, with the bits that the sites compute.
        """
        return advanced(held, decode_chain(self._outgoing, encoded, work_layout(layout_of(held))))


class _Filtered:
    """An aggregator that gives decoded and filtered updates to the strategy's aggregator.

    A tensor that a site holds back is missing from its update. Strategies that need whole updates see its global value.
    A tensor that no site sends keeps its global value.
    """

    def __init__(
        self,
        make: Callable[[Allocate], Aggregator],
        base: Arrays,
        allocate: Allocate,
        filters: Sequence[RunningFilter],
        *,
        linear: bool = True,
        partial: bool = True,
        differences: bool = False,
        held: Arrays | None = None,
    ) -> None:
        """Make the aggregator.

        Args:
            make: Makes the strategy's aggregator, given the function that allocates the next global model.
            base: The global model of this round.
            allocate: Makes the arrays of the next global model.
            filters: The filters of `server_in`, in order.
            linear: Whether the strategy's aggregator is a running mean, which reads each update once.
            partial: Whether the strategy's aggregator takes updates that lack tensors.
            differences: Whether it takes differences instead of weights.
            held: The global model as the sites hold it, if it was encoded on its way; see `decoded`.
        """
        self._linear, self._partial, self._differences = linear, partial, differences
        self._base, self._held, self._allocate, self._filters = base, held, allocate, filters
        self._inner = make(self._allocate_whole)
        self._decoding = False
        self._names: set[str] = set()
        self._work: dict[str, Array] = {}

    def add(self, update: Update) -> None:
        filtered = is_filtered(update)
        self._decoding |= filtered or bool(self._filters) or self._held is not None
        update = decoded(update, self._base, self._held)
        if self._filters or self._differences:
            update = self._apply_filters(update)
        self._names.update(update.arrays)
        if filtered and not self._partial and update.arrays.keys() != self._base.keys():
            sent = update.arrays
            complete = LazyArrays(self._base, lambda name: sent[name] if name in sent else self._base[name])
            update = replace(update, arrays=complete)
        self._inner.add(update)

    def result(self) -> tuple[Arrays, Arrays]:
        arrays, extras = self._inner.result()
        if self._decoding and not self._differences:
            for name in arrays.keys() - self._names:  # held back by every site
                arrays[name][...] = self._base[name]
        return arrays, extras

    def _allocate_whole(self, arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
        """Allocate the next model with the layout of the last, since decoded updates are wider and may lack tensors."""
        return self._allocate(self._base if self._decoding else arrays, extras)

    def _apply_filters(self, update: Update) -> Update:
        """Apply the filters of `server_in` to the differences of an update."""
        task = Task(update.job, update.round, update.stage, "train", update.base_version, self._base)
        differences = {}
        for name in update.arrays:
            dtype = work_dtype(self._base[name].dtype)
            out = self._work.get(name)
            if out is None or not self._linear:  # the strategy may read it again, so the buffer is not reused
                out = self._work[name] = np.empty(self._base[name].shape, dtype)
            if is_floating(dtype):
                np.subtract(update.arrays[name], self._base[name], out=out, dtype=dtype, casting="unsafe")
            else:
                out[...] = update.arrays[name]
            differences[name] = out
        update = replace(update, arrays=differences, content="delta")
        for change in self._filters:
            update = change(update, task)
        return update if self._differences else decoded(update, self._base)


@lru_cache(maxsize=256)
def _parsed(encoding: str) -> tuple[tuple[Settings, ...], tuple[EncodingFilter, ...]]:
    """Parse a site's list of filters: (settings of all of them, those that must be decoded)."""
    if not encoding.startswith("["):
        return (), ()
    try:
        items = parse_json(encoding, limit_chars=_MAX_CHARS)
        if not isinstance(items, list) or len(items) > MAX_FILTERS or not all(isinstance(x, dict) for x in items):
            raise ProtocolError("an update's list of filters is too long or malformed")
        chain = []
        for settings in items:
            if settings.get("name") in _ENCODING_NAMES:
                arguments = {name: value for name, value in settings.items() if name != "site"}
                chain.append(make_filter(arguments))
        if len(chain) > _MAX_CHAIN:
            raise ProtocolError(f"an update lists {len(chain)} encodings; the limit is {_MAX_CHAIN}")
    except (ValueError, TypeError, RecursionError, FederationError) as error:
        raise ProtocolError(f"an update's list of filters cannot be read: {error}") from None
    return tuple(items), tuple(chain)
