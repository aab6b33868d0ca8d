"""LoRA: the strategies that form the mean of the sites' products, sum_i p_i s_i B_i A_i, exactly.

Their updates hold factors in the encoding ENCODING: every B is multiplied by its site's own scale s (alpha / r, or
alpha / sqrt(r)), so the server needs to know of no scales, and sites may differ in them. In the global model the two
factors of a module have whatever rank the strategy gives them; B A is all that has been learnt, relative to the base
that the sites began with, so the global model is an adapter of scale 1 for that base. A site takes of it what
`site_part` says: factors that it trains, and the rest, which it adds to its base weight.

Tensors that are no factors (DoRA's magnitudes, biases, modules to save) are averaged. With DoRA, what is said of
products holds for the direction, W + s B A, which the magnitudes scale.
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
"""Of an update whose factors these are, B multiplied by its site's scale."""

SitePart = Literal["first", "mean", "none"]


@dataclass(frozen=True)
class LoraProducts(Described):
    """What these strategies have in common.

    site_part: what a site trains of the global factors: the "first" of its rank, and it drops the rest; those of its
    rank, which are the "mean", and the rest goes to its base; or "none" of them: all go to the base, and the site
    begins with a new A and B = 0. mixed: sites may have different ranks. weights: p_i is the site's share of all
    "examples", or the same for every site ("equal").
    """

    content: ClassVar[Content] = "encoded"
    initial: ClassVar[Literal["first", "all"]] = "first"
    linear: ClassVar[bool] = False
    weighted: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({LORA})
    site_part: ClassVar[SitePart]
    mixed: ClassVar[bool] = True
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    @property
    def changes_base(self) -> bool:
        """Whether a site adds to its base weights."""
        return self.site_part != "first"

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The rank of a factor may differ, where ranks may."""
        factor = factor_of(name) if self.mixed and len(shape) == 2 else None
        return (-1, shape[1]) if factor == "A" else (shape[0], -1) if factor == "B" else shape

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Nothing: what a site does follows from the strategy's name."""
        return {}

    def check(self, update: Update) -> None:
        """Factors that can be multiplied, and no extras."""
        where = f"update of {update.site}, round {update.round}"
        if (update.content, update.encoding) != ("encoded", ENCODING):
            raise UpdateRefusedError(f"an update of content {update.content!r} where factors are wanted", where=where)
        if update.extras:
            raise UpdateRefusedError(
                f"the strategy {self.name} takes no tensors beside the factors, such as {next(iter(update.extras))}",
                where=where,
                fix='use optimizer_state="keep" or "reset"',
            )
        pairs = pairs_of(update.arrays)
        if len(pairs) * 2 != sum(factor_of(name) is not None for name in update.arrays):
            raise UpdateRefusedError("an update that lacks a factor", where=where)
        for pair in pairs:
            a, b = update.arrays[pair.a], update.arrays[pair.b]
            fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.dtype == b.dtype
            if not fits or not 1 <= a.shape[0] <= max(a.shape[1], b.shape[0]):
                raise UpdateRefusedError(
                    f"{pair.a} {list(a.shape)} and {pair.b} {list(b.shape)} are no factors of one module", where=where
                )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Waits for all updates; they lie in files of the server until then."""
        return _Products(self, base, allocate)

    @abstractmethod
    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """The next global factors of one module, of those that the sites send and their shares, which sum to 1.
        All float64."""

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """None: the model is a plain file of tensors."""
        return None


@dataclass(frozen=True)
class Factors:
    """b: [out, rank], with the scale; a: [rank, in]. Their product is what a module adds to its weight."""

    b: Array
    a: Array

    @property
    def rank(self) -> int:
        """May be 0 for what lies in the base."""
        return int(self.a.shape[0])

    def after(self, rank: int) -> Factors:
        """Without the first `rank` dimensions."""
        return Factors(self.b[:, rank:], self.a[rank:])


@dataclass(frozen=True)
class FlexLoRA(LoraProducts):
    """B' A' = the best approximation of sum_i p_i s_i B_i A_i with R dimensions (truncated SVD); a site takes the
    first r_i of them.

    Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources".
    rank: R; 0 takes the largest of the sites' ranks. The base is not changed. What a site of a smaller rank does not
    take is not lost: it is in the global model, but no update of that site contains it.
    """

    name: ClassVar[str] = "flexlora"
    site_part: ClassVar[SitePart] = "first"
    rank: int = number(0, least=0)

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """See the class."""
        rank = self.rank or max(site.rank for site in sites)
        return _factors(_stacked(sites, shares), max(rank, 1))


@dataclass(frozen=True)
class FedExLoRA(LoraProducts):
    """B' = sum_i p_i B_i,  A' = sum_i p_i A_i;  W' = W + s (sum_i p_i B_i A_i - B' A').

    Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models".
    The residual is sum_i p_i (B_i - B')(A_i - A'), of at most (sites - 1) r dimensions. Those of all rounds lie behind
    the first r dimensions of the global factors, so a site that comes late or again has the same base as the others.
    All sites have one rank.
    """

    name: ClassVar[str] = "fedex-lora"
    site_part: ClassVar[SitePart] = "mean"
    mixed: ClassVar[bool] = False

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """See the class."""
        b = sum(p * site.b for p, site in zip(shares, sites, strict=True))
        a = sum(p * site.a for p, site in zip(shares, sites, strict=True))
        deviations = _stacked([Factors(site.b - b, site.a - a) for site in sites], shares)
        rest = _factors(_joined([base.after(sites[0].rank), deviations]))
        return _joined([Factors(np.asarray(b), np.asarray(a)), rest])


@dataclass(frozen=True)
class FLoRA(LoraProducts):
    """W' = W + sum_i p_i s_i B_i A_i, formed by stacking: [p_1 s_1 B_1, ..., p_k s_k B_k] [A_1; ...; A_k].

    Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations".
    Every site merges the stack into its base and begins each round with a new A and B = 0. The stacks of all rounds
    are in the global factors (brought to as many dimensions as their product has), so a site that comes late or again
    has the same base as the others.
    """

    name: ClassVar[str] = "flora"
    site_part: ClassVar[SitePart] = "none"

    def combined(self, base: Factors, sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
        """See the class."""
        found = _factors(_joined([base, _stacked(sites, shares)]))
        return found if found.rank else Factors(0 * base.b[:, :1], base.a[:1])  # nothing has been learnt yet


class _Products:
    """One round: the strategy's `combined` for every module, and the mean of everything else."""

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
        found: dict[str, Array] = dict(self._mean.result()[0]) if self._others else {}
        for pair in self._pairs:
            base = _wide(self._base, pair)
            product = self._strategy.combined(base, [_wide(u.arrays, pair) for u in self._updates], shares)
            dtype = self._base[pair.a].dtype
            found[pair.a], found[pair.b] = product.a.astype(dtype), product.b.astype(dtype)
        out, extras = self._allocate({name: found[name] for name in self._base}, {})
        for name, target in out.items():
            target[...] = found[name]
        return out, extras


def _in_memory(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return {name: np.empty_like(array) for name, array in arrays.items()}, {}


def _wide(arrays: Mapping[str, Array], pair: Pair) -> Factors:
    return Factors(arrays[pair.b].astype(np.float64), arrays[pair.a].astype(np.float64))


def _stacked(sites: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """The weighted sum of products, as one product."""
    return _joined([Factors(share * site.b, site.a) for share, site in zip(shares, sites, strict=True)])


def _joined(parts: Sequence[Factors]) -> Factors:
    """The sum of products, as one product."""
    return Factors(np.concatenate([part.b for part in parts], axis=1), np.concatenate([part.a for part in parts]))


def _factors(product: Factors, rank: int | None = None) -> Factors:
    if product.rank == 0:
        return product
    return Factors(*factorized(product.b, product.a, rank))
