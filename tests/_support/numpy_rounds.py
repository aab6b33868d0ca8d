"""Rounds through the real server whose sites do simple arithmetic, and the same rounds in plain NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from federation_bench import Site, serving

from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.types import Array, Arrays, Task

EXAMPLES = (30, 10, 70, 5, 45, 20, 60, 15)
STEPS = (4, 1, 9, 2, 6, 3, 8, 5)

Model: TypeAlias = dict[str, Array]
Trained: TypeAlias = Callable[[int, int, Array], Array]
"""(site's index, round, tensor) -> the tensor after this site's work, with the same dtype."""


def pulled(index: int, round: int, x: Array) -> Array:
    """Move a tensor part of the way to the site's own target, which differs in each round."""
    target = np.random.default_rng([index, round, x.size]).normal(size=x.shape)
    return np.asarray(x + 0.1 * STEPS[index] * (target - x)).astype(x.dtype)


def weights() -> Model:
    """Return tensors of three floating-point widths."""
    rng = np.random.default_rng(0)
    return {"layer.weight": rng.normal(size=(40, 3)), "layer.bias": rng.normal(size=5).astype(np.float32)}


def rounds_of(
    folder: Path,
    strategy: str | None,
    initial: Arrays,
    *,
    sites: int = 3,
    rounds: int = 4,
    trained: Trained = pulled,
    held_back: Mapping[int, Sequence[str]] = {},
    **fields: Any,
) -> list[Model]:
    """Return copies of the global model after each round; `fields` are those of RunSettings.

    Args:
        held_back: Tensors that a site holds back in every round, by its index.
    """
    found: dict[int, Model] = {}

    with serving(folder, sites, sockets=False, rounds=rounds, strategy=strategy, **fields) as bench:

        def work(name: str) -> None:
            site, index = bench.site(name), bench.names.index(name)
            site.join()
            site.register(initial)
            task = site.start(initial)
            while True:
                found[task.version] = {key: np.copy(array) for key, array in task.arrays.items()}
                if task.kind == "final":
                    break
                submitted(site, task, index, trained, held_back.get(index, ()))
                task = site.client.next_task()
            site.client.leave("done", early=False)

        bench.run(work)
    return [found[version] for version in sorted(found) if version > 0]


def submitted(site: Site, task: Task, index: int, trained: Trained = pulled, held_back: Sequence[str] = ()) -> str:
    arrays = {name: trained(index, task.round, array) for name, array in task.arrays.items() if name not in held_back}
    encoding = json.dumps([ExcludeVars(tuple(held_back)).settings()]) if held_back else ""
    return site.submit(task, arrays, EXAMPLES[index], local_steps=STEPS[index], encoding=encoding)


def reference(
    initial: Arrays,
    next_model: Callable[[Array, list[Array], int, dict[str, Any]], Array],
    *,
    sites: Sequence[int] | Callable[[int], Sequence[int]] = (0, 1, 2),
    rounds: int = 4,
    trained: Trained = pulled,
) -> list[Model]:
    """Compute the same rounds in float64, one tensor at a time.

    Args:
        next_model: Called as next_model(x, the sites' tensors, round, memory).
        sites: Who takes part, in all rounds or by round.
    """
    models: list[Model] = []

    def taking_part(number: int) -> Sequence[int]:
        return sites(number) if callable(sites) else sites

    memory: dict[str, dict[str, Any]] = {name: {} for name in initial}
    model = {name: np.asarray(array, np.float64) for name, array in initial.items()}
    for number in range(1, rounds + 1):
        model = {
            name: next_model(x, [trained(index, number, x) for index in taking_part(number)], number, memory[name])
            for name, x in model.items()
        }
        models.append(model)
    return models


def assert_same(found: list[Model], wanted: list[Model], tolerance: float = 1e-6) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name, array in ours.items():
            np.testing.assert_allclose(array.astype(np.float64), theirs[name], rtol=tolerance, atol=tolerance)
