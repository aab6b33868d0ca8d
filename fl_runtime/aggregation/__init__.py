"""How a round's updates become the next global model: strategies, by the name a user writes."""

from __future__ import annotations

from fl_runtime.aggregation.fedavg import FedAvg
from fl_runtime.aggregation.trees import TreeBagging, TreeCyclic, TreeHistogram
from fl_runtime.errors import ConfigError
from fl_runtime.types import Strategy

__all__ = ["FedAvg", "TreeBagging", "TreeCyclic", "TreeHistogram", "known_strategies", "make_strategy"]


def known_strategies() -> tuple[str, ...]:
    """The names that `--strategy` and `Job(strategy=...)` take."""
    return ("fedavg", "tree-bagging", "tree-cyclic", "tree-histogram")


def make_strategy(spec: str) -> Strategy:
    """The strategy of a spec such as "fedavg"; ConfigError lists the known ones."""
    name, _, arguments = spec.partition(":")
    if name.lower() not in known_strategies():
        raise ConfigError(f"unknown strategy {name!r}", fix=f"use one of: {', '.join(known_strategies())}")
    if arguments:
        raise ConfigError(f"the strategy {name!r} takes no arguments, but {arguments!r} was given", fix=f"write {name}")
    match name.lower():
        case "tree-bagging":
            return TreeBagging()
        case "tree-cyclic":
            return TreeCyclic()
        case "tree-histogram":
            return TreeHistogram()
        case _:
            return FedAvg()
