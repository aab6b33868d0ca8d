"""SCAFFOLD (Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fl_runtime.aggregation.base import WeightsStrategy, is_statistic
from fl_runtime.aggregation.corrections.local_terms import LocalTerms, is_control
from fl_runtime.aggregation.fedavg import WeightedMean, blocks
from fl_runtime.aggregation.spec import choice, number
from fl_runtime.capabilities import GRADIENT_CORRECTION, WEIGHTS
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, ServerState, Settings, Update


@dataclass(frozen=True)
class Scaffold(WeightsStrategy):
    """x' = x + lr (mean_i y_i - x);  c' = c + (|S| / N) mean_i (c_i' - c_i), over the sites S of the round, of N.

    At site i every gradient g of the loss becomes g + c - c_i before the optimizer's step. After K steps:
    - option II, where the optimizer is SGD without momentum: c_i' = c_i - c + (x - y_i) / (K rate), with the sum of
      the steps' rates for K rate, so that a schedule may change them;
    - with every other optimizer a variant that is ours, "mean gradient": c_i' is the mean of the K gradients, as they
      were before c - c_i was added. With plain SGD of one rate, and without clipping, the two are the same.

    c and c_i begin with 0. c travels beside the weights, and the change of c_i beside each update, so both ways take
    twice the bytes. c is a part of the committed model; c_i stays at its site. lr: of the paper's server step.
    weights: of the means over the sites; the paper counts every site once ("equal").
    """

    name: ClassVar[str] = "scaffold"
    linear: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, GRADIENT_CORRECTION})
    lr: float = number(1.0, above=0)
    weights: Literal["examples", "equal"] = choice("examples", "equal")

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """That gradients are corrected."""
        return LocalTerms(control_variates=True).to_config()

    def check(self, update: Update) -> None:
        """An update without control variates would leave c wrong for good."""
        if update.round > 0 and not any(is_control(name) for name in update.extras):
            raise UpdateRefusedError(
                "the update has no control variates",
                where=f"site {update.site}, round {update.round}",
                fix="use an adapter that supports scaffold; a filter must let the extras through",
            )

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        """The means of the round, and then the two steps."""
        return _Scaffold(base, WeightedMean(allocate, equal=self.weights == "equal"), state.extras, self.lr)


class _Scaffold:
    """Sums like FedAvg. A site sends its share of the change of c, (c_i' - c_i) / N, so their sum is what c gets."""

    def __init__(self, base: Arrays, mean: WeightedMean, control: Arrays, lr: float) -> None:
        self._base, self._mean, self._control, self._lr, self._count = base, mean, control, lr, 0

    def add(self, update: Update) -> None:
        self._mean.add(update)
        self._count += 1

    def result(self) -> tuple[Arrays, Arrays]:
        if self._lr != 1.0:
            for name, mean in self._mean.means().items():
                if mean.dtype.kind in "fc" and not is_statistic(name):
                    _step(mean.reshape(-1), self._base[name].reshape(-1), self._lr)
        arrays, extras = self._mean.result()
        for name, share in extras.items():
            if is_control(name):
                share *= share.dtype.type(self._count)
                if name in self._control:
                    share += self._control[name]
        return arrays, extras


def _step(mean: Array, base: Array, lr: float) -> None:
    """`mean` becomes x + lr (mean - x)."""
    for block in blocks(mean.size):
        x = base[block].astype(mean.dtype)
        mean[block] -= x
        mean[block] *= mean.dtype.type(lr)
        mean[block] += x
