"""Median, trimmed mean, Krum and norm bounding: against NumPy, and with two of eight sites lying."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from federation_bench import serving
from numpy_rounds import Model, assert_same, pulled, reference, rounds_of, weights
from sklearn.datasets import load_digits

from fl_adapters.job import Job
from fl_runtime.aggregation import Krum, make_strategy
from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.types import Array, ServerState, Update

SITES = 8


def median(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
    return np.asarray(np.median(parts, axis=0))


def trimmed(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
    return np.asarray(np.sort(parts, axis=0)[2:-2].mean(axis=0))


def bounded(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
    steps = [part - x for part in parts]
    return np.asarray(x + np.mean([d * min(1, 0.7 / np.linalg.norm(d)) for d in steps], axis=0))


def krum(f: int, m: int) -> Any:
    def plain(x: Array, parts: list[Array], number: int, memory: Any) -> Array:
        scores = []
        for i, one in enumerate(parts):
            squares = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(parts) if j != i)
            scores.append(sum(squares[: len(parts) - f - 2]))
        return np.asarray(np.mean([parts[i] for i in np.argsort(scores)[:m]], axis=0))

    return plain


@pytest.mark.parametrize("sites", [7, 8])
def test_median(tmp_path: Path, sites: int) -> None:
    actual = rounds_of(tmp_path, "median", weights(), sites=sites)
    assert_same(actual, reference(weights(), median, sites=range(sites)))


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("trimmed-mean:trim=0.25", trimmed),
        ("norm-bounding:bound=0.7", bounded),
        ("krum:f=1", krum(1, 1)),
        ("krum:f=2,m=4", krum(2, 4)),
    ],
)
def test_four_rounds_are_those_of_plain_numpy(tmp_path: Path, spec: str, plain: Any) -> None:
    initial = {"w": weights()["layer.weight"]}  # one tensor: norms and distances are over the whole model
    assert_same(rounds_of(tmp_path, spec, initial, sites=SITES), reference(initial, plain, sites=range(SITES)))


@pytest.mark.parametrize("spec", ["krum:f=2,m=3", "norm-bounding:bound=0.7"])
def test_norms_and_distances_are_over_all_tensors(tmp_path: Path, spec: str) -> None:
    """A model in two tensors is treated like the same model in one, though each alone would be judged differently."""
    whole = {"w": np.arange(40_000.0) / 10_000}
    split = {"a": whole["w"][:35_000], "b": whole["w"][35_000:].reshape(50, 100)}

    def noisy(index: int, number: int, x: Array) -> Array:
        """Add noise that does not depend on how the model is cut into tensors."""
        noise = np.random.default_rng([index, number]).normal(size=40_000) * (1 + index)
        part = {40_000: noise, 35_000: noise[:35_000], 5_000: noise[35_000:]}[x.size]
        return np.asarray(x + part.reshape(x.shape))

    one = rounds_of(tmp_path / "one", spec, whole, sites=SITES, rounds=2, trained=noisy)
    two = rounds_of(tmp_path / "two", spec, split, sites=SITES, rounds=2, trained=noisy)
    for left, right in zip(one, two, strict=True):
        np.testing.assert_allclose(np.concatenate([right["a"], right["b"].ravel()]), left["w"], rtol=1e-12)


@pytest.mark.parametrize("spec", ["median", "trimmed-mean:trim=0.3", "krum:f=2,m=3", "norm-bounding"])
def test_every_dtype_has_a_middle(tmp_path: Path, spec: str) -> None:
    initial: Model = {
        "half": np.full(3, 0.5, np.float16),
        "brain": np.full(3, 0.5, ml_dtypes.bfloat16),
        "wave": np.full(3, 1 - 1j, np.complex64),
        "count": np.array(10),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3)),
    }

    def trained(index: int, number: int, x: Array) -> Array:
        liar = index >= 6
        if x.dtype == bool:
            return ~x if liar else x
        if x.dtype.kind == "i":
            return np.asarray(x + (10**15 if liar else index % 2))
        return np.asarray(x * (-60 if liar else 1)).astype(x.dtype)

    actual = rounds_of(tmp_path, spec, initial, sites=SITES, rounds=1, trained=trained)[0]
    assert actual["count"] in (10, 11)
    assert actual["mask"].tolist() == [True, False]
    for name in ("half", "brain", "wave"):
        assert actual[name].dtype == initial[name].dtype
        if spec != "norm-bounding":
            np.testing.assert_array_equal(actual[name], initial[name])


# -- two of eight sites send the opposite of what they have learned, ten times over ---------------------------------

TEST = 400


def digits() -> tuple[list[tuple[Array, Array]], tuple[Array, Array]]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = np.hstack([x, np.full((len(x), 1), 16.0)])[order] / 16, y[order]
    parts = np.array_split(np.arange(TEST, len(x)), SITES)
    return [(x[part], y[part]) for part in parts], (x[:TEST], y[:TEST])


def logistic_regression(w: Array, x: Array, y: Array, steps: int = 10, lr: float = 0.5) -> Array:
    w = w.copy()
    for _ in range(steps):
        scores = np.exp(x @ w - (x @ w).max(axis=1, keepdims=True))
        p = scores / scores.sum(axis=1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        w -= lr * x.T @ p / len(y)
    return w


def accuracy(folder: Path, strategy: str, liars: int) -> float:
    """Return the accuracy in percent after some rounds."""
    sites, (test_x, test_y) = digits()

    def trained(index: int, number: int, w: Array) -> Array:
        learned = logistic_regression(w, *sites[index])
        return w - 10 * (learned - w) if index < liars else learned

    initial = {"w": np.zeros((65, 10))}
    model = rounds_of(folder, strategy, initial, sites=SITES, rounds=15, trained=trained)[-1]["w"]
    return float(100 * np.mean((test_x @ model).argmax(axis=1) == test_y))


def test_two_of_eight_sites_lie(tmp_path: Path) -> None:
    clean = accuracy(tmp_path / "clean", "fedavg", liars=0)
    assert clean > 85
    for spec in ("median", "trimmed-mean:trim=0.25", "krum:f=2", "krum:f=2,m=4"):
        assert accuracy(tmp_path / spec.replace(":", "-"), spec, liars=2) > clean - 3, spec
    assert accuracy(tmp_path / "fooled", "fedavg", liars=2) < 50


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sites", "min_sites", "expected"),
    [
        ("krum:f=2", 6, None, "2 f + 3 = 7"),
        ("krum:f=1", 8, 4, "close with 4"),
        ("krum:f=1,m=5", 5, None, "only 4 of 5"),
        ("trimmed-mean:trim=0.1", 9, None, "removes no value of 9"),
        ("trimmed-mean", 8, 3, "removes no value of 3"),
        ("trimmed-mean:trim=0.5", 8, None, "below 0.5"),
        ("trimmed-mean:trim=0", 8, None, "above 0"),
        ("krum:f=-1", 8, None, "at least 0"),
        ("krum:m=0", 8, None, "at least 1"),
        ("norm-bounding:bound=0", 8, None, "above 0"),
        ("median:trim=0.1", 8, None, "no argument 'trim'"),
    ],
)
def test_a_job_that_cannot_work_is_refused(spec: str, sites: int, min_sites: int | None, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Job(app="train.py", sites=sites, min_sites=min_sites, strategy=spec)
    assert caught.value.where == "strategy"
    assert expected in str(caught.value)


def test_a_job_that_can_work() -> None:
    for spec, sites in (("krum:f=2", 7), ("krum:f=0", 3), ("trimmed-mean:trim=0.2", 5), ("median", 1)):
        assert Job(app="train.py", sites=sites, strategy=spec).strategy == spec


@pytest.mark.parametrize("spec", ["median", "krum:f=0", "norm-bounding"])
def test_moments_of_optimizers_are_no_way_around(tmp_path: Path, spec: str) -> None:
    with serving(tmp_path, 3, sockets=False, strategy=spec) as bench:
        sites, tasks = bench.started({"w": np.zeros(2)})
        with pytest.raises(UpdateRefusedError, match="beside the weights, such as exp_avg"):
            sites["site-2"].submit(tasks["site-2"], {"w": np.ones(2)}, extras={"exp_avg": np.full(2, 1e9)})


def test_krum_takes_the_first_of_equals() -> None:
    assert Krum(f=1, m=2).chosen(np.zeros((5, 5))) == [0, 1]


def test_any_order_of_arrival_gives_the_same_bits(tmp_path: Path) -> None:
    def result(order: tuple[int, ...]) -> bytes:
        with serving(tmp_path / str(order), 5, sockets=False, rounds=1, strategy="krum:f=1,m=3") as bench:
            sites, tasks = bench.started({"w": np.zeros(50, np.float32)})
            for index in order:
                name = bench.names[index]
                sites[name].submit(tasks[name], {"w": pulled(index, 1, np.zeros(50, np.float32))})
            return sites["site-1"].client.next_task().arrays["w"].tobytes()

    orders = list(itertools.permutations(range(5)))[::17]
    assert len({result(order) for order in orders}) == 1


@pytest.mark.parametrize("spec", ["median", "krum:f=3,m=4", "norm-bounding"])
def test_memory_does_not_grow_with_the_model(spec: str) -> None:
    """Updates and the result lie in mapped files; here they are arrays that exist before counting begins."""
    size, sites = 2**21, 10
    base = {"w": np.zeros(size, np.float32)}
    updates = [Update("job", 1, "", f"site-{i}", 1, 0, {"w": np.full(size, i, np.float32)}, 1) for i in range(sites)]
    out = {"w": np.empty(size, np.float32)}
    strategy = make_strategy(spec)
    tracemalloc.start()
    try:
        aggregator = strategy.aggregator(base, lambda arrays, extras: (out, {}), {}, ServerState())
        for update in updates:
            aggregator.add(update)
        aggregator.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * base["w"].nbytes
