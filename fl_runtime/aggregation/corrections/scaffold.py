"""The strategy `scaffold`: control variates correct the drift of local training."""

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
    """Stochastic controlled averaging: control variates correct the gradients of each site.

        x' = x + lr (mean_i y_i - x),   c' = c + (|S| / N) mean_i (c_i' - c_i)

    S are the sites of the round, N is the number of all sites, and y_i are the weights of site i after training. At
    site i every gradient g of the loss becomes g + c - c_i before the optimizer step. After K steps, the site sets:

    - for SGD without momentum (option II of the paper): c_i' = c_i - c + (x - y_i) / (K rate), where the sum of the
      steps' learning rates stands for K rate, so that a schedule may change them;
    - for every other optimizer (our variant, "mean gradient"): c_i' is the mean of the K gradients before the
      correction. For SGD with a constant learning rate and without clipping, both are the same.

    c and c_i are initially 0. c travels beside the weights and the change of c_i beside each update, so both directions
    need twice the bytes. c is part of the committed model; c_i stays at its site. Sites need the capability
    "gradient-correction".

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1.

    Attributes:
        lr: Learning rate of the server, greater than 0.
        weights: The means are weighted by numbers of "examples", or all sites count the same ("equal", as in the
            paper).

    Raises:
        ConfigError: If an argument is out of range.
    """

    name: ClassVar[str] = "scaffold"
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
        return _Scaffold(base, WeightedMean(allocate, equal=self.weights == "equal"), state.extras, self.lr)


class _Scaffold:
    """Averages like FedAvg. A site sends (c_i' - c_i) / N, so c changes by the sum over the sites."""

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
    """Replace `mean` by x + lr (mean - x)."""
    for block in blocks(mean.size):
        x = base[block].astype(mean.dtype)
        mean[block] -= x
        mean[block] *= mean.dtype.type(lr)
        mean[block] += x
