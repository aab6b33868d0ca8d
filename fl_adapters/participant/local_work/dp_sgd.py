"""`DPSGD`: the settings of training with differential privacy for single records (DP-SGD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import check_number
from fl_runtime.filters.ledger import PrivacyBudget

EPSILON_METRIC = "dp_sgd_epsilon"
"""Name of the metric with the epsilon that a site has spent on its records."""

DELTA_INFO = "dp_sgd_delta"
"""Name under which a site tells the delta of that epsilon at the handshake, where its policy tells its software."""


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Trains with DP-SGD: the gradient of each record is clipped, and noise is added to their sum before each step.

        g = (sum over the batch of g_i min(1, max_grad_norm / |g_i|) + N(0, (noise_multiplier max_grad_norm)^2 I)) / B

    The unit of privacy is a single record of the site's data, present or absent. All that is computed from the weights
    afterwards is protected too: the update, the global model, and what others make of it. Metrics, numbers of examples
    and the initial model are not covered.

    The accountant reads from the data loader how batches are drawn. Of batches that are shuffled, each record is in one
    per epoch; an epoch is then one release of Gaussian noise, and no amplification is claimed. Of Poisson batches
    (`opacus.data_loader.DPDataLoader.from_data_loader(loader)`), each step is a release that is amplified by sampling,
    and the same epsilon takes less noise. Epsilon is in the site's ledger, in the
    history as `dp_sgd_epsilon`, and with its delta in the report.

    The loss must be a mean over records: with one over tokens or pairs, a record changes the gradients of others. Needs
    the extra `[dp]`, which brings Opacus.

    Sources: Abadi et al. 2016, "Deep learning with differential privacy"; Chua et al. 2024, "How private are DP-SGD
    implementations?" (why shuffled batches are not amplified like Poisson batches).

    Attributes:
        max_grad_norm: Largest L2 norm of one record's gradient over all trained parameters, greater than 0.
        epsilon: Privacy budget of the job, greater than 0. Without it, `noise_multiplier` must be a number.
        delta: The delta at which epsilon is computed, between 0 and 1. It should be below 1 / number of records.
        noise_multiplier: Standard deviation of the noise divided by `max_grad_norm`, greater than 0. "auto" computes it
            from `epsilon`, `delta`, the number of rounds, and the batches.
        trainings: Number of trainings of the script that share the budget, such as the folds of a cross-validation. For
            noise_multiplier "auto".

    Raises:
        ConfigError: If an argument is out of range.

    Example:
        ```python
        from fl_adapters import DPSGD

        callback = FederatedCallback(dp_sgd=DPSGD(max_grad_norm=1.0, epsilon=8))
        ```
    """

    max_grad_norm: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    noise_multiplier: float | Literal["auto"] = "auto"
    trainings: int = 1

    def __post_init__(self) -> None:
        check_number(self, "max_grad_norm", self.max_grad_norm, above=0)
        check_number(self, "delta", self.delta, above=0, below=1)
        check_number(self, "trainings", self.trainings, least=1)
        if self.noise_multiplier != "auto":
            check_number(self, "noise_multiplier", self.noise_multiplier, above=0)
        if self.epsilon is not None:
            check_number(self, "epsilon", self.epsilon, above=0)
        elif self.noise_multiplier == "auto":
            raise ConfigError(
                "DPSGD has neither a budget nor noise",
                where="dp_sgd",
                fix="give epsilon, such as 8, from which the noise is computed; or noise_multiplier",
            )

    @property
    def budget(self) -> PrivacyBudget | None:
        """The job's budget for records, or None."""
        return None if self.epsilon is None else PrivacyBudget(self.epsilon, self.delta)
