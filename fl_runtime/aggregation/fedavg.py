"""The strategy `fedavg`: federated averaging, the weighted mean of the sites' weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.spec import choice
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update, is_floating

_BLOCK = 2**16
"""Elements per block: one block each of accumulator, input and scratch space fit into the cache."""
_LARGE = 2**22
"""Smallest number of elements that is worth a thread."""
_THREADS = min(os.cpu_count() or 1, 4)
_pool = ThreadPoolExecutor(_THREADS, "fl-sum")


@dataclass(frozen=True)
class FedAvg(WeightsStrategy):
    """Federated averaging: the mean of the sites' weights, weighted by their numbers of examples.

        x' = sum_i n_i x_i / sum_i n_i

    It is computed as a running mean over the sites in fixed order (West 1979, "Updating mean and variance estimates"):
    mean_k = mean_{k-1} + (n_k / N_k) (x_k - mean_{k-1}), with N_k = n_1 + ... + n_k. This needs one accumulator for any
    number of sites, and returns exactly x if all sites send the same x, so frozen tensors do not drift. Subtraction,
    product and sum are separate operations, never fused, in float32 (float64 for float64 tensors, complex64 for complex
    ones). The bits therefore depend on the set of updates alone.

    Integer and boolean tensors are not averaged: each element becomes the maximum over the sites, so that a counter
    such as `num_batches_tracked` stays an integer and never decreases. Extras follow the same rules. Sites need no
    special capability.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1.

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "fedavg"
    partial: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    @property
    def linear(self) -> bool:
        """Whether the strategy needs only the mean weighted by numbers of examples."""
        return self.weights == "examples"

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return the running mean of a round."""
        return WeightedMean(allocate, equal=self.weights == "equal")


class WeightedMean:
    """The running weighted mean of updates with content "weights". All updates must have the same extras.

    Args:
        allocate: Makes the arrays of the next global model.
        equal: Whether all sites have the same weight, whatever their numbers of examples.
    """

    def __init__(self, allocate: Allocate, *, equal: bool = False) -> None:
        self._allocate, self._equal = allocate, equal
        self._weights: dict[tuple[bool, str], float] = {}
        self._extra_names: tuple[str, ...] = ()
        self._out: dict[tuple[bool, str], Array] = {}
        self._sums: dict[tuple[bool, str], Array] = {}

    def add(self, update: Update) -> None:
        """Add one update to the mean; its arrays are not used after the call.

        Args:
            update: The update. Tensors that it lacks are averaged over the other updates.

        Raises:
            UpdateRefusedError: If it does not hold weights, or its extras differ from those of the first update.
        """
        if self._equal:
            update = replace(update, num_examples=1)
        if update.content != "weights":
            raise UpdateRefusedError(
                f"FedAvg averages weights, but this update holds {update.content}", where=f"site {update.site}"
            )
        if not self._out:
            self._begin(update)
        if tuple(update.extras) != self._extra_names:
            raise UpdateRefusedError(
                f"extra tensors differ between sites: {list(update.extras)[:4]} and {list(self._extra_names)[:4]}",
                where=f"site {update.site}, round {update.round}",
                fix="use the same optimizer and optimizer_state setting at every site",
            )
        for key, mean in self._sums.items():
            extra, name = key
            value = (update.extras if extra else update.arrays).get(name)
            if value is None:  # held back by a filter of the site
                continue
            previous, weight = self._weights.get(key, 0.0), self._weight(update, key)
            self._weights[key] = previous + weight
            share = weight / self._weights[key]
            _fold_all(mean.reshape(-1), value.reshape(-1), share, first=not previous)

    def means(self) -> dict[str, Array]:
        """Return the means of the weights that any site has sent, floats in float32 or wider.

        Writing to them changes the result.
        """
        return {key[1]: mean for key, mean in self._sums.items() if not key[0] and key in self._weights}

    def result(self) -> tuple[Arrays, Arrays]:
        """Return (arrays, extras) of the mean, in the arrays that `allocate` made."""
        for key, mean in self._sums.items():
            if mean is not self._out[key]:
                for block in blocks(mean.size):
                    self._out[key].reshape(-1)[block] = mean.reshape(-1)[block]
        arrays = {name: array for (extra, name), array in self._out.items() if not extra}
        extras = {name: array for (extra, name), array in self._out.items() if extra}
        return arrays, extras

    def _weight(self, update: Update, key: tuple[bool, str]) -> float:
        """Weight of one array in its mean; the key says whether it is an extra, and its name."""
        return update.weight

    def _begin(self, update: Update) -> None:
        arrays, extras = self._allocate(update.arrays, update.extras)
        self._extra_names = tuple(update.extras)
        self._out = {(False, n): a for n, a in arrays.items()} | {(True, n): a for n, a in extras.items()}
        self._sums = {key: _accumulator(out) for key, out in self._out.items()}


def accumulator_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which a tensor is summed: float32 or wider; integers and booleans keep theirs."""
    if not is_floating(dtype) or (dtype.itemsize >= 4 and dtype.kind in "fc"):
        return dtype
    return np.dtype(np.float32)


def _accumulator(out: Array) -> Array:
    """Return the output itself if its dtype is wide enough to sum in, otherwise a new array."""
    wide = accumulator_dtype(out.dtype)
    return out if wide == out.dtype else np.empty(out.shape, wide)


def _fold_all(mean: Array, value: Array, share: float, *, first: bool) -> None:
    """Call `_fold` on parts of a large tensor in several threads; the result is the same."""
    parts = max(1, min(_THREADS, mean.size // _LARGE))
    edges = [mean.size * part // parts for part in range(parts + 1)]
    head, *tail = (slice(start, stop) for start, stop in pairwise(edges))
    futures = [_pool.submit(_fold, mean[part], value[part], share, first=first) for part in tail]
    _fold(mean[head], value[head], share, first=first)
    for future in futures:
        future.result()


def _fold(mean: Array, value: Array, share: float, *, first: bool) -> None:
    """Fold one site's flat tensor into the running mean, block by block."""
    if first:
        mean[...] = value
        return
    averaged = is_floating(mean.dtype)
    scratch = np.empty(min(_BLOCK, mean.size), mean.dtype)
    factor = np.asarray(share, mean.dtype)
    for block in blocks(mean.size):
        target = mean[block]
        if averaged:
            step = scratch[: target.size]
            np.subtract(value[block], target, out=step, dtype=mean.dtype, casting="unsafe")
            np.multiply(step, factor, out=step)
            np.add(target, step, out=target)
        else:
            np.maximum(target, value[block], out=target)


def blocks(size: int) -> Iterator[slice]:
    """Yield slices that cover a flat tensor of `size` elements, each small enough for the cache."""
    for start in range(0, size, _BLOCK):
        yield slice(start, start + _BLOCK)
