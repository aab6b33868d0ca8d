"""The strategy `scaffold`: control variates correct the drift of local training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.base import WeightsStrategy
from fl_runtime.aggregation.corrections.local_terms import LocalTerms, is_control
from fl_runtime.aggregation.fedavg import WeightedMean, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.capabilities import GRADIENT_CORRECTION, WEIGHTS
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update
from fl_runtime.types.tensor_names import is_statistic

_KEPT = "site_weights"


@dataclass(frozen=True)
class Scaffold(WeightsStrategy):
    """Stochastic controlled averaging: control variates correct the gradients of each site.

        x' = x + lr (mean_i y_i - x),   c' = c + sum_i p_i (c_i' - c_i)

    The mean and the sum are over the sites of the round, and y_i are the weights of site i after training. p_i is the
    share of site i in the weights of all sites of the job, so the sum of all p_i is 1. With "equal" weights
    p_i = 1 / N, as in the paper. At site i every gradient g of the loss becomes g + c - c_i before the optimizer step.

    Invariant: after every round, c = sum_i p_i c_i over all sites, whichever sites took part. Without it, c - c_i has a
    mean other than 0 and the run converges to a wrong optimum. The server knows the weight of a site from the first
    update that counts, and uses this number for c in the rest of the run. Until then it assumes the mean of the known
    weights, and scales c when a new weight becomes known: c_i of a site that has not taken part is 0.

    After K steps, the site sets:

    - for SGD without momentum (option II of the paper): c_i' = c_i - c + (x - y_i) / (K rate), where the sum of the
      steps' learning rates stands for K rate, so that a schedule may change them;
    - for every other optimizer (our variant, "mean gradient"): c_i' is the mean of the K gradients before the
      correction. For SGD with a constant learning rate and without clipping, both are the same.

    c and c_i are initially 0. c travels beside the weights and the change of c_i beside each update, so both directions
    need twice the bytes. c is part of the committed model, and the weights of the sites are kept with it; c_i stays at
    its site. Sites need the capability "gradient-correction".

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1.

    Attributes:
        lr: Learning rate of the server, greater than 0.
        weights: The means are weighted by numbers of "examples", or all sites count the same ("equal", as in the
            paper).

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "scaffold"
    partial: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, GRADIENT_CORRECTION})
    lr: float = number(1.0, above=0)
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return the setting that makes sites correct their gradients."""
        return LocalTerms(control_variates=True).to_config()

    def check(self, update: Update) -> None:
        """Refuse an update without control variates, since c would stay wrong for the rest of the run."""
        if update.round > 0 and not any(is_control(name) for name in update.extras):
            raise UpdateRefusedError(
                "the update has no control variates",
                where=f"site {update.site}, round {update.round}",
                fix="use an adapter that supports scaffold, and no filter that removes extras",
            )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """Return an aggregator that averages the updates, then steps x and c."""
        weights = _SiteWeights(state, equal=self.weights == "equal")
        return _Scaffold(base, _ScaffoldMean(allocate, weights), weights, state, self.lr)


class _SiteWeights:
    """Weights of all sites in c: those with which they first took part."""

    def __init__(self, state: ServerState, *, equal: bool) -> None:
        self.equal = equal
        self._sites = state.sites
        weights = state.previous.get(_KEPT)
        self._before = {} if weights is None else {n: float(w) for n, w in zip(self._sites, weights, strict=True) if w}
        self._known, self._round = dict(self._before), dict[str, float]()
        # a site that comes later is held to the cap among the earlier ones, whose weights in c cannot change any more
        cap, others = state.max_share, math.fsum(self._before.values())
        self._most = cap / (1 - cap) * others if others and cap is not None and cap < 1 else math.inf

    def of(self, update: Update) -> float:
        """Return the weight of the update's site; the first one counts."""
        weight = self._known.setdefault(update.site, min(update.weight, self._most))
        self._round[update.site] = weight
        return weight

    @property
    def count(self) -> int:
        """Number of sites of the job."""
        return len(self._sites) or len(self._known)

    def share_of_round(self) -> float:
        """Return the share of the round's sites in the weights of all; exactly 1 if all take part."""
        return math.fsum(self._round.values()) / self._total(self._known)

    def growth(self) -> float:
        """Return the factor by which the weights of all sites have become more than the last round's estimate."""
        return self._total(self._known) / self._total(self._before) if self._before else 1.0

    def keep(self, state: ServerState) -> None:
        """Commit the weights with the next model."""
        if self._sites:
            weights = np.array([self._known.get(name, 0.0) for name in self._sites])
            state.allocate_next({_KEPT: weights})[_KEPT][...] = weights

    def _total(self, known: Mapping[str, float]) -> float:
        """Return the sum of all weights, the mean of the known ones standing for each unknown one."""
        total = math.fsum(known.values())
        return total + (self.count - len(known)) * (total / len(known))


class _ScaffoldMean(WeightedMean):
    """A weighted mean in which a control variate has the weight that its site has in c."""

    def __init__(self, allocate: Allocate, weights: _SiteWeights) -> None:
        super().__init__(allocate, equal=weights.equal)
        self._site_weights = weights

    def _weight(self, update: Update, key: tuple[bool, str]) -> float:
        extra, name = key
        return self._site_weights.of(update) if extra and is_control(name) else update.weight


class _Scaffold:
    """Averages like FedAvg. A site sends (c_i' - c_i) / N, so c changes by N sum_i p_i times what the sites sent."""

    def __init__(self, base: Arrays, mean: WeightedMean, weights: _SiteWeights, state: ServerState, lr: float) -> None:
        self._base, self._mean, self._weights, self._state, self._lr = base, mean, weights, state, lr

    def add(self, update: Update) -> None:
        self._mean.add(update)

    def result(self) -> tuple[Arrays, Arrays]:
        if self._lr != 1.0:
            for name, mean in self._mean.means().items():
                if mean.dtype.kind in "fc" and not is_statistic(name):
                    _step(mean.reshape(-1), self._base[name].reshape(-1), self._lr)
        arrays, extras = self._mean.result()
        controls = [name for name in extras if is_control(name)]
        if controls:
            self._weights.keep(self._state)
        for name in controls:
            share = extras[name]
            share *= share.dtype.type(self._weights.count * self._weights.share_of_round())
            if name in self._state.extras:
                share += self._grown(self._state.extras[name])
        return arrays, extras

    def _grown(self, c: Array) -> Array:
        """Return c for the weights that are known now; the same array if they are those of the last round."""
        growth = self._weights.growth()
        if growth == 1.0:
            return c
        scaled: Array = c * c.dtype.type(1.0 / growth)
        return scaled


def _step(mean: Array, base: Array, lr: float) -> None:
    """Replace `mean` by x + lr (mean - x)."""
    for block in blocks(mean.size):
        x = base[block].astype(mean.dtype)
        mean[block] -= x
        mean[block] *= mean.dtype.type(lr)
        mean[block] += x
