"""LoRA: the strategies that average factors.

A site's weight is W_i = W + s B_i A_i. mean(B) mean(A) is not mean(B A): `FedIT` lives with that, `FFALoRA`, `RoLoRA`
and `FedSALoRA` let one factor alone differ between sites, so that what they average is exact. All other tensors that
travel (DoRA's magnitudes, biases, modules to save) are averaged. All sites have the same rank. The base is never
changed, so it may be quantised. lora_products.py has the strategies that form the mean of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.lora.names import FROZEN, Factor
from fl_runtime.capabilities import LORA, WEIGHTS
from fl_runtime.types import Settings


@dataclass(frozen=True)
class LoraAverage(FedAvg):
    """What these strategies have in common. stays: the factor that never leaves a site, "" for none."""

    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS, LORA})
    stays: ClassVar[Literal["", "A", "B"]] = ""

    def frozen(self, round: int) -> Factor | None:
        """The factor that no site trains in this round."""
        return None

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        """Tells the sites what is frozen."""
        frozen = self.frozen(round)
        return {FROZEN: frozen} if frozen else {}


@dataclass(frozen=True)
class FedIT(LoraAverage):
    """A' = sum_i p_i A_i,  B' = sum_i p_i B_i,  p_i = n_i / sum n: what `fedavg` does with a PEFT model.

    Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning". The product B'A' is not the
    mean of the sites' products.
    """

    name: ClassVar[str] = "fedit"


@dataclass(frozen=True)
class FFALoRA(LoraAverage):
    """A is what it was at the start, the same at all sites; B' = sum_i p_i B_i, so that B'A = sum_i p_i B_i A.

    Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning". A does not travel: the handshake
    compares its fingerprint.
    """

    name: ClassVar[str] = "ffa-lora"
    stays: ClassVar[Literal["", "A", "B"]] = "A"

    def frozen(self, round: int) -> Factor | None:
        """Always A."""
        return "A"


@dataclass(frozen=True)
class RoLoRA(LoraAverage):
    """Odd rounds: A is frozen and B' = sum_i p_i B_i; even rounds: B is frozen and A' = sum_i p_i A_i.

    Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA". What is frozen is
    the same at all sites, so the mean of the products is exact in every round. It does not travel to the server.
    """

    name: ClassVar[str] = "rolora"

    @property
    def linear(self) -> bool:
        """False: updates lack a factor, so nobody else may form their mean."""
        return False

    def frozen(self, round: int) -> Factor | None:
        """A in odd rounds: where B begins as zero, A would not move in the first."""
        return "A" if round % 2 else "B"


@dataclass(frozen=True)
class FedSALoRA(LoraAverage):
    """A' = sum_i p_i A_i; every site keeps a B_i of its own.

    Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning". B neither travels nor is
    reset, so the models of the sites differ after the run.
    """

    name: ClassVar[str] = "fedsa-lora"
    stays: ClassVar[Literal["", "A", "B"]] = "B"
