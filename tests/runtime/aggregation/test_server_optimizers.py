"""FedAvgM, FedAdam, FedYogi, FedAdagrad and FedNova through the real server, against a few lines of NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from federation_bench import serving
from numpy_rounds import EXAMPLES, STEPS, Model, assert_same, reference, rounds_of, weights

from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.types import Array

N = np.array(EXAMPLES[:3], float)


def mean(parts: list[Array], n: Array = N) -> Array:
    return np.asarray(np.tensordot(n / n.sum(), np.array(parts), 1))


def fedavg(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    return mean(parts)


def fedavg_equal(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    return mean(parts, np.ones(3))


def fedavgm(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    memory["m"] = 0.7 * memory.get("m", 0) + mean(parts) - x
    return np.asarray(x + 0.5 * memory["m"])


def fedadam(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    d = mean(parts) - x
    memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * d
    memory["v"] = 0.95 * memory.get("v", 0.01**2) + 0.05 * d**2
    return np.asarray(x + 0.1 * memory["m"] / (np.sqrt(memory["v"]) + 0.01))


def fedyogi(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    d, v = mean(parts) - x, memory.get("v", 1e-3**2)
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * d
    memory["v"] = v - 0.01 * d**2 * np.sign(v - d**2)
    return np.asarray(x + 0.01 * memory["m"] / (np.sqrt(memory["v"]) + 1e-3))


def fedadagrad(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    d = mean(parts) - x
    memory["v"] = memory.get("v", 1e-3**2) + d**2
    return np.asarray(x + 0.1 * d / (np.sqrt(memory["v"]) + 1e-3))


def fednova(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    p, steps = N / N.sum(), np.array(STEPS[:3])
    return np.asarray(x + (p @ steps) * sum(p[i] * (parts[i] - x) / steps[i] for i in range(3)))


def fednova_momentum(x: Array, parts: list[Array], number: int, memory: dict[str, Any]) -> Array:
    """Compute a_i as a sum over the site's steps: how often each gradient is added to the weights."""
    p = N / N.sum()
    a = np.array([sum(sum(0.9**k for k in range(t - s)) for s in range(t)) for t in STEPS[:3]])
    return np.asarray(x + (p @ a) * sum(p[i] * (parts[i] - x) / a[i] for i in range(3)))


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("fedavg", fedavg),
        ("fedavg:weights=equal", fedavg_equal),
        ("fedavgm:lr=0.5,momentum=0.7", fedavgm),
        ("fedavgm:lr=1,momentum=0,weights=equal", fedavg_equal),
        ("fedadam:lr=0.1,beta1=0.8,beta2=0.95,tau=0.01", fedadam),
        ("fedyogi", fedyogi),
        ("fedadagrad", fedadagrad),
        ("fednova", fednova),
        ("fednova:momentum=0.9", fednova_momentum),
    ],
)
def test_four_rounds_are_those_of_plain_numpy(tmp_path: Path, spec: str, plain: Any) -> None:
    assert_same(rounds_of(tmp_path, spec, weights()), reference(weights(), plain))


@pytest.mark.parametrize("spec", ["fedadam:lr=0.1", "fedavgm", "fednova"])
def test_what_is_no_parameter_is_averaged_as_ever(tmp_path: Path, spec: str) -> None:
    """Counters stay integers, and a running variance never goes below zero."""
    initial: Model = {
        "bn.running_var": np.full(4, 1e-3, np.float32),
        "bn/moving_variance": np.full(4, 1e-3, np.float32),
        "bn.num_batches_tracked": np.array(7),
        "mask": np.array([True, False]),
    }
    if spec != "fednova":
        initial["wave"] = np.full(3, 1 + 2j, np.complex64)

    def trained(index: int, number: int, x: Array) -> Array:
        return np.asarray(x + index if x.dtype.kind == "i" else x if x.dtype.kind == "b" else x / (1 + STEPS[index]))

    actual = rounds_of(tmp_path / "found", spec, initial, trained=trained)
    expected = rounds_of(tmp_path / "wanted", "fedavg", initial, trained=trained)
    for left, right in zip(actual, expected, strict=True):
        for name, array in right.items():
            assert left[name].dtype == initial[name].dtype
            np.testing.assert_array_equal(left[name], array)


@pytest.mark.parametrize("spec", ["fedadam:lr=0.1", "fednova"])
def test_moments_of_narrow_weights_are_wide(tmp_path: Path, spec: str) -> None:
    """bfloat16 has 8 bits: steps are taken in float32, and only each round's model is rounded."""
    initial = {"w": np.linspace(-2, 2, 33).astype(ml_dtypes.bfloat16)}
    wide = {"w": initial["w"].astype(np.float32)}
    actual = rounds_of(tmp_path / "narrow", spec, initial, rounds=2)
    exact = rounds_of(tmp_path / "wide", spec, wide, rounds=2)
    assert actual[0]["w"].dtype == ml_dtypes.bfloat16
    for left, right in zip(actual, exact, strict=True):
        np.testing.assert_allclose(left["w"].astype(np.float32), right["w"], rtol=2**-6, atol=2**-5)


def test_optimizer_state_that_travels_is_averaged_as_ever(tmp_path: Path) -> None:
    for spec in ("fedadam", "fednova"):
        with serving(tmp_path / spec, 2, sockets=False, rounds=1, strategy=spec) as bench:
            sites, tasks = bench.started({"w": np.zeros(2)})
            for index, (name, site) in enumerate(sites.items()):
                extras = {"exp_avg": np.full(3, index, np.float32)}
                site.submit(tasks[name], {"w": np.ones(2)}, 1 + 2 * index, local_steps=2, extras=extras)
            assert sites["site-1"].client.next_task().extras["exp_avg"].tolist() == [0.75] * 3


def test_moments_stay_at_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=2, strategy="fedadam") as bench:
        sites, tasks = bench.started({"w": np.zeros(2)})
        sites["site-1"].submit(tasks["site-1"], {"w": np.ones(2)})
        task = sites["site-1"].client.next_task()
        cohort = {"participants": 1, "updates": 1}
        assert (list(task.arrays), dict(task.extras), dict(task.config)) == (["w"], {}, cohort)


def test_only_the_newest_moments_are_stored(tmp_path: Path) -> None:
    rounds_of(tmp_path, "fedadam", weights(), rounds=6)
    assert [path.stem for path in (tmp_path / "server" / "blobs").glob("kept-*")] == ["kept-6"]


def test_fednova_needs_the_number_of_steps(tmp_path: Path) -> None:
    with serving(tmp_path, 1, sockets=False, rounds=1, strategy="fednova") as bench:
        sites, tasks = bench.started({"w": np.zeros(2)})
        with pytest.raises(UpdateRefusedError, match="number of local optimizer steps") as caught:
            sites["site-1"].submit(tasks["site-1"], {"w": np.ones(2)})
        assert "site-1, round 1" in caught.value.where


@pytest.mark.parametrize(
    "spec",
    """fedavgm:momentum=1 fedavgm:lr=0 fedavgm:momentum=-0.1 fedadam:beta1=1 fedadam:beta2=1.5 fedadam:tau=0
    fedyogi:lr=-1 fedadagrad:beta2=0.9 fednova:momentum=1 fedavg:weights=none""".split(),
)
def test_arguments_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec.partition(":")[0]):
        make_strategy(spec)
