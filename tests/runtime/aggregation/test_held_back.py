"""Tensors that some sites hold back: each strategy combines them as if only the sites that send them took part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_rounds import EXAMPLES, STEPS, assert_same, reference, rounds_of, weights

from fl_runtime.aggregation import known_strategies, make_strategy
from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.site import SiteFilters
from fl_runtime.types import Array, Arrays

SITES = 4
HELD_BACK = {
    0: ("layer.weight", "all.of.them"),
    2: ("layer.weight", "all.of.them"),
    1: ("all.of.them",),
    3: ("all.of.them",),
}

Plain = Callable[[Array, list[Array], Any, Any, dict[str, Any]], Array]
"""(x, the senders' tensors, their examples, their steps, what the server keeps of the tensor) -> the next tensor."""


def model() -> dict[str, Array]:
    return {**weights(), "all.of.them": np.full(4, 3.0)}


def mean(x: Array, parts: list[Array], n: Any, steps: Any, memory: Any) -> Array:
    return np.asarray(sum(w * part for w, part in zip(n / n.sum(), parts, strict=True)))


def equal(x: Array, parts: list[Array], n: Any, steps: Any, memory: Any) -> Array:
    return np.mean(parts, axis=0)


def nova(x: Array, parts: list[Array], n: Any, steps: Any, memory: Any) -> Array:
    p = n / n.sum()
    return np.asarray(x + (p @ steps) * sum(w * (part - x) / a for w, part, a in zip(p, parts, steps, strict=True)))


def momentum(x: Array, parts: list[Array], n: Any, steps: Any, memory: dict[str, Any]) -> Array:
    memory["m"] = 0.9 * memory.get("m", 0.0) + mean(x, parts, n, steps, memory) - x
    return np.asarray(x + memory["m"])


def adam(x: Array, parts: list[Array], n: Any, steps: Any, memory: dict[str, Any]) -> Array:
    delta = mean(x, parts, n, steps, memory) - x
    memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * delta
    memory["v"] = 0.99 * memory.get("v", 1e-6) + 0.01 * delta**2
    return np.asarray(x + 0.1 * memory["m"] / (np.sqrt(memory["v"]) + 1e-3))


def median(x: Array, parts: list[Array], n: Any, steps: Any, memory: Any) -> Array:
    return np.median(parts, axis=0)


STRATEGIES: dict[str, Plain] = {
    "fedavg": mean,
    "fedavg:weights=equal": equal,
    "fednova": nova,
    "fednova:weights=equal": lambda x, parts, n, steps, memory: nova(x, parts, np.ones(len(n)), steps, memory),
    "fedavgm": momentum,
    "fedadam:lr=0.1": adam,
    "median": median,
    "norm-bounding:bound=1e9": equal,
    f"fedbuff:k={SITES},staleness=0": equal,
    f"fedbuff:k={SITES},staleness=0,weights=examples": mean,
}


def by_hand(plain: Plain, initial: Arrays) -> list[dict[str, Array]]:
    """Compute each tensor by itself, over the sites that send it."""
    rounds: list[dict[str, Array]] = [{} for _ in range(4)]
    for name, array in initial.items():
        senders = [site for site in range(SITES) if name not in HELD_BACK.get(site, ())]
        n, steps = (np.array([values[site] for site in senders], float) for values in (EXAMPLES, STEPS))

        def next_tensor(
            x: Array, parts: list[Array], number: int, memory: Any, n: Any = n, steps: Any = steps
        ) -> Array:
            return plain(x, parts, n, steps, memory) if parts else x

        for found, tensors in zip(rounds, reference({name: array}, next_tensor, sites=senders), strict=True):
            found |= tensors
    return rounds


@pytest.mark.parametrize("spec", STRATEGIES)
def test_only_the_sites_that_send_a_tensor_count_for_it(tmp_path: Path, spec: str) -> None:
    rounds = 1 if spec.startswith("fedbuff") else 4  # without rounds, the order of later updates is not fixed
    found = rounds_of(tmp_path, spec, model(), sites=SITES, rounds=rounds, held_back=HELD_BACK)
    assert_same(found, by_hand(STRATEGIES[spec], model())[:rounds], tolerance=2e-6)


@pytest.mark.parametrize("spec", ["fedavg:weights=equal", "fednova", "median", "fedadam"])
def test_where_all_send_everything_the_bits_are_those_of_unfiltered_updates(tmp_path: Path, spec: str) -> None:
    """An update that says it holds back a tensor which is not there goes the way of filtered ones."""
    initial = weights()
    plain = rounds_of(tmp_path / "plain", spec, initial)
    filtered = rounds_of(tmp_path / "filtered", spec, initial, held_back=dict.fromkeys(range(3), ("none",)))
    for ours, theirs in zip(filtered, plain, strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in initial)


def test_strategies_that_compare_whole_updates_refuse_a_site_that_holds_tensors_back() -> None:
    policy = [{"name": "ExcludeVars", "names": ["layer.bias"]}]
    refusing = set()
    for name in known_strategies():
        strategy = make_strategy(name)
        if strategy.content != "weights" or strategy.relayed or name == "scaffold":  # these refuse every such filter
            continue
        try:
            SiteFilters((), policy, FilterHost("north")).agree(model(), strategy=strategy)
        except ConfigError as error:
            refusing.add(error.what.partition("but ")[2])
    assert refusing == {"krum compares whole updates", "trimmed-mean compares whole updates"}
    SiteFilters(policy, (), FilterHost("north")).agree(model(), strategy=make_strategy("krum"))  # at all sites alike


def test_filters_of_a_policy_that_the_strategy_cannot_take_are_refused_before_round_1() -> None:
    def agree(strategy: str, *policy: dict[str, Any], extras: bool = False) -> None:
        SiteFilters((), policy, FilterHost("north")).agree(model(), strategy=make_strategy(strategy), extras=extras)

    with pytest.raises(ConfigError, match="Examples hides the number of local steps, which fednova needs"):
        agree("fednova", {"name": "Examples", "equal": True})
    with pytest.raises(ConfigError, match="control variates of scaffold"):
        agree("scaffold", {"name": "PercentilePrivacy"}, extras=True)
    with pytest.raises(ConfigError, match="works on weights, which the sites send each other under Swarm"):
        agree("swarm", {"name": "Quantize"})
    agree("swarm", {"name": "AllowMetrics"})


def test_central_noise_on_tensors_that_are_held_back_is_refused() -> None:
    central = {"name": "GaussianDP", "noise_multiplier": 1.0, "at": "server_in"}
    with pytest.raises(ConfigError, match="adds noise to every tensor, also to those that ExcludeVars holds back"):
        SiteFilters((central,), [{"name": "ExcludeVars", "names": ["layer.bias"]}], FilterHost("north"))
