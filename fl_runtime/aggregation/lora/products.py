"""LoRA strategies that average the sites' products, sum_i p_i s_i B_i A_i, exactly.

Updates have the encoding "lora-factors": every B is multiplied by its site's scale s (alpha / r, or alpha / sqrt(r)).
So the server need not know the scales, and sites may have different ones. In the global model, B A is everything that
has been learnt relative to the initial base weights; its rank depends on the strategy. So the global model is an
adapter of scale 1 for those base weights. `site_part` says which part of it a site trains; it adds the rest to its base
weights.

All other tensors (DoRA's magnitudes, biases, modules to save) are averaged. With DoRA, the formulas hold for the
direction W + s B A, which the magnitudes scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.fedavg import WeightedMean
from fl_runtime.aggregation.lora.algebra import factorized
from fl_runtime.aggregation.lora.names import Pair, factor_of, pairs_of
from fl_runtime.aggregation.spec import Described, choice, number
from fl_runtime.capabilities import LORA
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, Content, ServerState, Settings, Update

ENCODING = "lora-factors"
"""`Update.encoding` of factors in which B is multiplied by its site's scale."""

SitePart = Literal["first", "mean", "none"]


@dataclass(frozen=True)
class LoraProducts(Described):
    """Base of the strategies that average products. A subclass adds `name`, `site_part` and `combined`.

    Attributes:
        content: What updates hold: "encoded".
        initial: Whose weights the initial model is made of, see `Strategy`.
        linear: Always false: the strategy needs every update.
        weighted: Whether `site_weights` of the job have an effect.
        requires: Capabilities that every site's adapter must have.
        site_part: The part of the global factors that a site trains. "first": the first r dimensions, r being its own
            rank; it drops the rest. "mean": the first r dimensions; it adds the rest to its base weights. "none": it
            adds everything to its base weights and starts with a new A and B = 0.
        mixed: Whether sites may have different ranks.
        weights: p_i is the site's share of all "examples", or the same for every site ("equal").
    """

    content: ClassVar[Content] = "encoded"
    initial: ClassVar[Literal["first", "all", "none"]] = "first"
    linear: ClassVar[bool] = False
    weighted: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({LORA})
    site_part: ClassVar[SitePart]
    mixed: ClassVar[bool] = True
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    @property
    def changes_base(self) -> bool:
        """Whether sites change their base weights."""
        return self.site_part != "first"

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with -1 for the rank of a factor, if sites may have different ranks."""
        factor = factor_of(name) if self.mixed and len(shape) == 2 else None
        return (-1, shape[1]) if factor == "A" else (shape[0], -1) if factor == "B" else shape

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return no settings: what a site does follows from the strategy's name."""
        return {}

    def check(self, update: Update) -> None:
        """Refuse updates that have extras or are not complete pairs of matching factors."""
        where = f"update of {update.site}, round {update.round}"
        if (update.content, update.encoding) != ("encoded", ENCODING):
            raise UpdateRefusedError(
                f"the update has the content {update.content!r} in the encoding {update.encoding[:60]!r}, but the "
                f"strategy {self.name} needs the factors of LoRA modules",
                where=where,
                fix="use an adapter that supports this strategy",
            )
        if update.extras:
            raise UpdateRefusedError(
                f"the strategy {self.name} takes no tensors beside the factors, such as {next(iter(update.extras))}",
                where=where,
                fix='use optimizer_state="keep" or "reset"',
            )
        pairs = pairs_of(update.arrays)
        if len(pairs) * 2 != sum(factor_of(name) is not None for name in update.arrays):
            raise UpdateRefusedError("the update lacks a factor of a LoRA module", where=where)
        for pair in pairs:
            a, b = update.arrays[pair.a], update.arrays[pair.b]
            fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.dtype == b.dtype
            if not fits or not 1 <= a.shape[0] <= max(a.shape[1], b.shape[0]):
                raise UpdateRefusedError(
                    f"{pair.a} {list(a.shape)} and {pair.b} {list(b.shape)} cannot be the factors of one LoRA module",
                    where=where,
                )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator that waits for all updates, which lie in files of the server until then."""
        return _Products(self, base, allocate)

    @abstractmethod
    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """Compute the next global factors of one module, in float64.

        Args:
            base: The global factors of the round.
            sites: The factors that the sites sent.
            shares: The share p_i of each site; their sum is 1.

        Returns:
            The next global factors.
        """

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """Return None: the model is stored as a plain tensor file."""
        return None


@dataclass(frozen=True)
class Factors:
    """The factors of one module, whose product b a is added to its weight.

    Attributes:
        b: [out, rank], multiplied by the scale.
        a: [rank, in].
    """

    b: Array
    a: Array

    @property
    def rank(self) -> int:
        """Number of dimensions, which may be 0."""
        return int(self.a.shape[0])

    def after(self, rank: int) -> Factors:
        """Return the factors without the first `rank` dimensions."""
        return Factors(self.b[:, rank:], self.a[rank:])


@dataclass(frozen=True)
class FlexLoRA(LoraProducts):
    """B' A' is the best approximation of sum_i p_i s_i B_i A_i with rank R (truncated SVD).

    A site of rank r_i trains the first r_i dimensions. The others stay in the global model, but that site's updates do
    not contain them. Base weights are not changed. Sites need a model with a LoRA adapter; ranks may differ.

    Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources".

    Attributes:
        rank: R, at least 1; 0 takes the largest of the sites' ranks.
        weights: p_i is the site's share of all "examples", or the same for every site ("equal").

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "flexlora"
    site_part: ClassVar[SitePart] = "first"
    rank: int = number(0, least=0)

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """Compute the truncated SVD, see `LoraProducts.combined`."""
        rank = self.rank or max(site.rank for site in sites)
        return _factors(_stacked(sites, shares), max(rank, 1))


@dataclass(frozen=True)
class FedExLoRA(LoraProducts):
    """Averages both factors and adds the residual to the base weights.

        B' = sum_i p_i B_i,   A' = sum_i p_i A_i,   W' = W + s (sum_i p_i B_i A_i - B' A')

    The residual equals sum_i p_i (B_i - B')(A_i - A') and has at most (sites - 1) r dimensions. The residuals of all
    rounds follow the first r dimensions of the global factors, so a site that joins late or rejoins has the same base
    weights as the others. Sites need a model with a LoRA adapter, all of the same rank.

    Source: Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models".

    Attributes:
        weights: p_i is the site's share of all "examples", or the same for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "fedex-lora"
    site_part: ClassVar[SitePart] = "mean"
    mixed: ClassVar[bool] = False

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """Compute the means and the residual, see `LoraProducts.combined`."""
        b = sum(p * site.b for p, site in zip(shares, sites, strict=True))
        a = sum(p * site.a for p, site in zip(shares, sites, strict=True))
        deviations = _stacked([Factors(site.b - b, site.a - a) for site in sites], shares)
        rest = _factors(_joined([base.after(sites[0].rank), deviations]))
        return _joined([Factors(np.asarray(b), np.asarray(a)), rest])


@dataclass(frozen=True)
class FLoRA(LoraProducts):
    """Adds the mean of the products to the base weights: W' = W + sum_i p_i s_i B_i A_i.

    The sum is formed by stacking: [p_1 s_1 B_1, ..., p_k s_k B_k] [A_1; ...; A_k]. Every site adds it to its base
    weights and starts each round with a new A and B = 0. The global factors hold the stacks of all rounds, reduced to
    the rank of their product, so a site that joins late or rejoins has the same base weights as the others. Sites need
    a model with a LoRA adapter; ranks may differ.

    Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations".

    Attributes:
        weights: p_i is the site's share of all "examples", or the same for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "flora"
    site_part: ClassVar[SitePart] = "none"

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """Stack the factors onto those of the base, see `LoraProducts.combined`."""
        stack = _factors(_joined([base, _stacked(sites, shares)]))
        return stack if stack.rank else Factors(0 * base.b[:, :1], base.a[:1])  # nothing has been learnt yet


class _Products:
    """The aggregator of one round: `combined` for every module, and the mean of all other tensors."""

    def __init__(self, strategy: LoraProducts, base: Arrays, allocate: Allocate) -> None:
        self._strategy, self._base, self._allocate = strategy, base, allocate
        self._equal = strategy.weights == "equal"
        self._pairs = pairs_of(base)
        self._others = [name for name in base if factor_of(name) is None]
        self._mean = WeightedMean(_in_memory, equal=self._equal)
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._strategy.check(update)
        self._updates.append(update)
        if self._others:
            rest = {name: update.arrays[name] for name in self._others}
            self._mean.add(replace(update, arrays=rest, content="weights", encoding=""))

    def result(self) -> tuple[Arrays, Arrays]:
        weights = [update.site_weight if self._equal else update.weight for update in self._updates]
        shares = [weight / sum(weights) for weight in weights]
        tensors: dict[str, Array] = dict(self._mean.result()[0]) if self._others else {}
        for pair in self._pairs:
            base = _wide(self._base, pair)
            product = self._strategy.combined(base, [_wide(u.arrays, pair) for u in self._updates], shares)
            dtype = self._base[pair.a].dtype
            tensors[pair.a], tensors[pair.b] = product.a.astype(dtype), product.b.astype(dtype)
        out, extras = self._allocate({name: tensors[name] for name in self._base}, {})
        for name, target in out.items():
            target[...] = tensors[name]
        return out, extras


def _in_memory(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return {name: np.empty_like(array) for name, array in arrays.items()}, {}


def _wide(arrays: Mapping[str, Array], pair: Pair) -> Factors:
    return Factors(arrays[pair.b].astype(np.float64), arrays[pair.a].astype(np.float64))


def _stacked(sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """Return the weighted sum of products as one product."""
    return _joined([Factors(share * site.b, site.a) for share, site in zip(shares, sites, strict=True)])


def _joined(parts: Sequence[Factors]) -> Factors:
    """Return the sum of products as one product."""
    return Factors(np.concatenate([part.b for part in parts], axis=1), np.concatenate([part.a for part in parts]))


def _factors(product: Factors, rank: int | None = None) -> Factors:
    if product.rank == 0:
        return product
    return Factors(*factorized(product.b, product.a, rank))
