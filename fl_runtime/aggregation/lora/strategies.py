"""LoRA strategies that average the factors A and B.

A site's weight is W_i = W + s B_i A_i. The product of the means, mean(B) mean(A), differs from mean(B A). `FedIT`
accepts that. `FFALoRA`, `RoLoRA` and `FedSALoRA` let only one factor differ between sites, so that their averages are
exact. All other tensors that travel (DoRA's magnitudes, biases, modules to save) are averaged. All sites need the same
rank. The base weights are never changed, so they may be quantised. See products.py for strategies that average the
products B A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.lora.names import FROZEN, Factor, frozen_patterns, patterns_of
from fl_runtime.capabilities import LORA, WEIGHTS
from fl_runtime.types import Settings


@dataclass(frozen=True)
class LoraAverage(FedAvg):
    """Base of the strategies that average factors.

    Attributes:
        requires: Capabilities that every site's adapter must have.
        stays: The factor that never leaves a site; "" for none. If it is fixed, see `frozen_as` for embeddings.
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").
    """

    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, LORA})
    stays: ClassVar[Literal["", "A", "B"]] = ""

    def frozen(self, round: int) -> Factor | None:
        """Choose the factor that stays fixed in a round.

        Args:
            round: Number of the round, from 1.

        Returns:
            "A" or "B", or None if both are trained.
        """
        return None

    @property
    def fixed(self) -> Factor | None:
        """The factor that is fixed in every round; None if there is none."""
        return self.frozen(1) if self.frozen(1) == self.frozen(2) else None

    @property
    def local_patterns(self) -> tuple[str, ...]:
        """Name patterns (`fnmatch`) of the factors that never leave a site."""
        if not self.stays:
            return ()
        return frozen_patterns(self.stays) if self.fixed else patterns_of(self.stays)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Return the setting that names the fixed factor."""
        frozen = self.frozen(round)
        return {FROZEN: frozen} if frozen else {}


@dataclass(frozen=True)
class FedIT(LoraAverage):
    """Averages both factors: A' = sum_i p_i A_i,  B' = sum_i p_i B_i,  p_i = n_i / sum n.

    This is what `fedavg` does with a PEFT model. The product B'A' is not the mean of the sites' products. Sites need a
    model with a LoRA adapter, all of the same rank.

    Source: Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning".

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "fedit"


@dataclass(frozen=True)
class FFALoRA(LoraAverage):
    """Keeps A fixed and averages B: B' = sum_i p_i B_i, so that B'A = sum_i p_i B_i A exactly.

    A is the initial one, equal at all sites. It does not travel; the handshake compares its fingerprint. An embedding
    begins with A = 0 in PEFT, so that B would have no gradient: there B is fixed and A is averaged, which is as exact.
    Sites need a model with a LoRA adapter, all of the same rank.

    Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning".

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "ffa-lora"
    stays: ClassVar[Literal["", "A", "B"]] = "A"

    def frozen(self, round: int) -> Factor | None:
        """Keep A fixed in every round.

        Args:
            round: Number of the round, from 1.

        Returns:
            "A".
        """
        return "A"


@dataclass(frozen=True)
class RoLoRA(LoraAverage):
    """Alternates: B' = sum_i p_i B_i with A fixed in odd rounds, A' = sum_i p_i A_i with B fixed in even rounds.

    The fixed factor is equal at all sites, so the mean of the products is exact in every round. The fixed factor is not
    sent to the server. For an embedding, which begins with A = 0 in PEFT, odd and even rounds change places. Sites need
    a model with a LoRA adapter, all of the same rank.

    Source: Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA".

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "rolora"

    @property
    def linear(self) -> bool:
        """Always false, since updates lack a factor."""
        return False

    def frozen(self, round: int) -> Factor | None:
        """Alternate, and begin with A fixed: B is initially 0, so A would have no gradient in round 1.

        Args:
            round: Number of the round, from 1.

        Returns:
            "A" in odd rounds and "B" in even ones.
        """
        return "A" if round % 2 else "B"


@dataclass(frozen=True)
class FedSALoRA(LoraAverage):
    """Averages A, A' = sum_i p_i A_i, while every site keeps its own B_i.

    B_i never leaves its site and is not reset, so the sites' models differ after the run. Sites need a model with a
    LoRA adapter, all of the same rank.

    Source: Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning".

    Attributes:
        weights: n_i is the site's number of "examples", or 1 for every site ("equal").

    Raises:
        ConfigError: If `weights` is neither.
    """

    name: ClassVar[str] = "fedsa-lora"
    stays: ClassVar[Literal["", "A", "B"]] = "B"
