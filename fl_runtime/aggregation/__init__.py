"""Strategies: how the updates of a round become the next global model.

A strategy is written as text, such as "fedadam:lr=0.1", in `--strategy` and `Job(strategy=...)`, or given as an object.
"""

from __future__ import annotations

from fl_runtime.aggregation.corrections.ditto import Ditto
from fl_runtime.aggregation.corrections.fedprox import FedProx
from fl_runtime.aggregation.corrections.scaffold import Scaffold
from fl_runtime.aggregation.cyclic import Cyclic
from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.fedbuff import FedBuff
from fl_runtime.aggregation.fednova import FedNova
from fl_runtime.aggregation.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fl_runtime.aggregation.lora.products import FedExLoRA, FlexLoRA, FLoRA
from fl_runtime.aggregation.lora.strategies import FedIT, FedSALoRA, FFALoRA, RoLoRA
from fl_runtime.aggregation.robust.strategies import CoordinateMedian, Krum, NormBounding, TrimmedMean
from fl_runtime.aggregation.spec import find
from fl_runtime.aggregation.sums.strategy import Sum
from fl_runtime.aggregation.swarm import Swarm
from fl_runtime.aggregation.trees.strategies import TreeBagging, TreeCyclic, TreeHistogram
from fl_runtime.types import Strategy, Terms

__all__ = [
    "CoordinateMedian",
    "Cyclic",
    "Ditto",
    "FFALoRA",
    "FLoRA",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedExLoRA",
    "FedIT",
    "FedNova",
    "FedProx",
    "FedSALoRA",
    "FedYogi",
    "FlexLoRA",
    "Krum",
    "NormBounding",
    "RoLoRA",
    "Scaffold",
    "Sum",
    "Swarm",
    "TreeBagging",
    "TreeCyclic",
    "TreeHistogram",
    "TrimmedMean",
    "known_strategies",
    "make_strategy",
    "strategy_of",
]

_STRATEGIES = (
    FedAvg,
    FedAvgM,
    FedAdam,
    FedYogi,
    FedAdagrad,
    FedNova,
    FedProx,
    Scaffold,
    Ditto,
    FedBuff,
    Cyclic,
    Swarm,
    CoordinateMedian,
    TrimmedMean,
    Krum,
    NormBounding,
    FedIT,
    FFALoRA,
    RoLoRA,
    FedSALoRA,
    FLoRA,
    FlexLoRA,
    FedExLoRA,
    TreeBagging,
    TreeCyclic,
    TreeHistogram,
    Sum,
)


def known_strategies() -> tuple[str, ...]:
    """Return the names of all shipped strategies, as `--strategy` and `Job(strategy=...)` take them."""
    return tuple(kind.name for kind in _STRATEGIES)


def make_strategy(spec: str) -> Strategy:
    """Make a strategy from its text.

    Args:
        spec: "name" or "name:argument=value,argument=value".

    Returns:
        The strategy.

    Raises:
        ConfigError: If the name or an argument is unknown, or a value is out of range.

    Example:
        strategy = make_strategy("fedavg:weights=equal")
    """
    strategy = find(_STRATEGIES, spec)
    assert isinstance(strategy, _STRATEGIES)
    return strategy


def strategy_of(job: str | None, terms: Terms) -> Strategy:
    """Return the strategy of a training.

    Args:
        job: The job's strategy as text; None if the job leaves it open.
        terms: What the script proposes.

    Returns:
        The job's strategy; the script's where the job has none, and where the script trains no model (`open_ended`).

    Raises:
        ConfigError: A name or an argument is unknown, or a value is out of range.
    """
    proposed = make_strategy(terms.strategy)
    return proposed if job is None or proposed.open_ended else make_strategy(job)
