"""Virtual sites for tests: a function in a file, its runs, and what they come to in plain NumPy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters import Job, Simulation
from fl_adapters.environments.local import SimulationResult
from fl_runtime.store.tensorfile import read_tensors

# Noise that is seeded by site and round, so the oracle below needs no more than the fixed order of the sites.
NOISY = """
import numpy as np
import fl_adapters as fl

def initial():
    return {"w": np.zeros((40, 3), np.float32), "b": np.ones(7, np.float32)}

def train(task, site):
    assert fl.site() == site
    rng = np.random.default_rng([site.index, task.round])
    arrays = {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in task.arrays.items()}
    task.submit(arrays, num_examples=site.index % 5 + 1, local_steps=2, metrics={"train_loss": 1.0 / task.round})
"""


def noisy(index: int, round: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the site sends, drawn in the order of the names as in the script above."""
    rng = np.random.default_rng([index, round])
    return {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in model.items()}


def averaged(sites: int, rounds: int, chosen: Callable[[int], list[int]] | None = None) -> dict[str, Any]:
    """Compute FedAvg in plain NumPy: the running mean in float32, in the order of the sites."""
    model = {"w": np.zeros((40, 3), np.float32), "b": np.ones(7, np.float32)}
    for round in range(1, rounds + 1):
        total, mean = 0, model
        for index in chosen(round) if chosen else range(sites):
            update, weight = noisy(index, round, model), index % 5 + 1
            total += weight
            share = np.float32(weight / total)
            mean = update if total == weight else {n: mean[n] + (update[n] - mean[n]) * share for n in mean}
        model = mean
    return model


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def script(text: str) -> str:
    Path("train.py").write_text(textwrap.dedent(text))
    return "train.py:train"


def simulated(app: str, *, sites: int = 50, rounds: int = 3, workers: int = 2, **options: Any) -> SimulationResult:
    known = {"engine": "processes", "quiet": True} | {
        name: options.pop(name) for name in ("engine", "function", "initial", "listeners", "args") if name in options
    }
    return Job(app=app, rounds=rounds, **options).run(Simulation(sites=sites, workers=workers, **known))


def model_of(result: SimulationResult) -> Mapping[str, Any]:
    assert result.model is not None
    return read_tensors(result.model / "model.safetensors")
