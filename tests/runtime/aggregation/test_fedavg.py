"""FedAvg against float64 NumPy; its bits depend on the set of updates alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from federation_bench import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_runtime.aggregation import FedAvg
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.types import Array, Arrays, ServerState, Update, is_floating
from fl_runtime.wire.dtypes import DTYPES

FLOATS = [name for name, dtype in DTYPES.items() if is_floating(dtype)]
WHOLE = [name for name, dtype in DTYPES.items() if not is_floating(dtype)]
EXAMPLES = (3, 1, 250, 17)


def update(site: int, arrays: Arrays, num_examples: int, extras: Arrays | None = None, **fields: Any) -> Update:
    return Update("job", 1, "", f"site-{site}", 1, 0, arrays, num_examples, extras=extras or {}, **fields)


def averaged(updates: Sequence[Update]) -> tuple[Arrays, Arrays]:
    aggregator = FedAvg().aggregator(
        updates[0].arrays,
        lambda arrays, extras: (
            {name: np.empty_like(array) for name, array in arrays.items()},
            {name: np.empty_like(array) for name, array in extras.items()},
        ),
        {},
        ServerState(),
    )
    for one in updates:
        aggregator.add(one)
    return aggregator.result()


def mean_of(values: Sequence[Array], examples: Sequence[int]) -> Array:
    """Compute the weighted mean in float64 (complex128)."""
    wide = np.complex128 if values[0].dtype.kind == "c" else np.float64
    total = sum(v.astype(wide) * n for v, n in zip(values, examples, strict=True))
    return np.asarray(total / sum(examples))


def precision(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def normal(shape: Any, dtype: np.dtype[Any], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype.kind == "c" else 0)
    return np.asarray(value).astype(dtype)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("shape", [(), (7, 3), (2**15 + 3,), (0, 4)])
def test_floats_of_every_dtype_become_the_weighted_mean(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    values = [normal(shape, dtype, seed) for seed in range(len(EXAMPLES))]
    actual, _ = averaged([update(i, {"w": v}, n) for i, (v, n) in enumerate(zip(values, EXAMPLES, strict=True))])
    expected = mean_of(values, EXAMPLES)
    assert actual["w"].dtype == dtype
    assert actual["w"].shape == shape
    # the sum is in float32 or wider: what is left is its error, and one rounding to the dtype
    step = float(ml_dtypes.finfo(dtype).smallest_subnormal)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(actual["w"].astype(expected.dtype), expected, rtol=precision(dtype), atol=step + 4e-7)


def test_float64_is_summed_in_float64() -> None:
    values = [normal((100,), np.dtype(np.float64), seed) for seed in range(4)]
    actual, _ = averaged([update(i, {"w": v}, n) for i, (v, n) in enumerate(zip(values, EXAMPLES, strict=True))])
    np.testing.assert_allclose(actual["w"], mean_of(values, EXAMPLES), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "large"), [(np.float16, 60_000), (ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57_344)]
)
def test_narrow_floats_do_not_overflow_while_they_are_summed(dtype: Any, large: float) -> None:
    value = np.full(5, large, dtype)
    actual, _ = averaged([update(i, {"w": value}, 10) for i in range(50)])
    assert actual["w"].tobytes() == value.tobytes()


def test_narrow_floats_are_rounded_once() -> None:
    """In bfloat16, 256 + 1 is 256: a sum in the wire's own dtype would never move."""
    values = [np.array([256], ml_dtypes.bfloat16), *[np.array([264], ml_dtypes.bfloat16)] * 99]
    actual, _ = averaged([update(i, {"w": v}, 1) for i, v in enumerate(values)])
    assert actual["w"].astype(np.float32).tolist() == [264.0]


@pytest.mark.parametrize("name", FLOATS)
def test_identical_inputs_come_back_bit_for_bit(name: str) -> None:
    value = normal((1000,), DTYPES[name], 1)
    actual, _ = averaged([update(i, {"w": value}, n) for i, n in enumerate((3, 7, 11, 1, 999_983))])
    assert actual["w"].tobytes() == value.tobytes()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 10**9)), min_size=1, max_size=12))
def test_the_mean_lies_where_float64_says(parts: list[tuple[float, int]]) -> None:
    values = [np.array([v], np.float32) for v, _ in parts]
    examples = [n for _, n in parts]
    actual, _ = averaged([update(i, {"w": v}, n) for i, (v, n) in enumerate(zip(values, examples, strict=True))])
    scale = max(abs(v) for v, _ in parts)
    np.testing.assert_allclose(actual["w"], mean_of(values, examples), rtol=0, atol=max(scale, 1e-30) * 1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_integers_and_booleans_become_the_maximum_and_stay_what_they_are(name: str) -> None:
    dtype = DTYPES[name]
    values = [np.array(v).astype(dtype) for v in ([0, 1, 1], [1, 0, 1], [0, 0, 1])]
    actual, _ = averaged([update(i, {"steps": v}, 10**i) for i, v in enumerate(values)])
    assert actual["steps"].dtype == dtype
    assert actual["steps"].tolist() == np.maximum.reduce(values).tolist()


def test_large_counters_are_exact() -> None:
    big = 2**62 + 1
    actual, _ = averaged([update(0, {"n": np.array(big)}, 1), update(1, {"n": np.array(big - 1)}, 99)])
    assert int(actual["n"]) == big


def test_extras_are_averaged_by_the_same_rules() -> None:
    actual, extras = averaged(
        [
            update(0, {"w": np.zeros(2)}, 1, {"w": np.array([0.0]), "step": np.array(3)}),
            update(1, {"w": np.ones(2)}, 3, {"w": np.array([4.0]), "step": np.array(5)}),
        ]
    )
    assert actual["w"].tolist() == [0.75, 0.75]
    assert extras["w"].tolist() == [3.0]
    assert extras["step"].tolist() == 5


def test_extras_that_one_site_lacks_are_refused_with_its_name() -> None:
    with pytest.raises(UpdateRefusedError, match="extra tensors differ") as caught:
        averaged([update(0, {"w": np.zeros(2)}, 1, {"m": np.zeros(1)}), update(1, {"w": np.zeros(2)}, 1)])
    assert "site-1" in caught.value.where


def test_content_that_is_no_weights_is_refused() -> None:
    with pytest.raises(UpdateRefusedError, match="delta"):
        averaged([update(0, {"w": np.zeros(2)}, 1, content="delta")])


def test_inputs_are_left_as_they_are() -> None:
    values = [np.full(3, float(i)) for i in range(3)]
    for value in values:
        value.flags.writeable = False
    averaged([update(i, {"w": v}, 1) for i, v in enumerate(values)])
    assert [v.tolist() for v in values] == [[i] * 3 for i in range(3)]


def test_every_order_of_arrival_gives_the_same_bits(tmp_path: Path) -> None:
    """Three sites whose floats are not associative to add, in all six orders, through the server itself."""
    weights = {
        "w": np.zeros(1000, np.float32),
        "b": np.zeros(70, ml_dtypes.bfloat16),
        "n": np.zeros((), np.int64),
    }

    def result(order: Sequence[int]) -> list[bytes]:
        folder = tmp_path / "".join(map(str, order))
        with serving(folder, 3, sockets=False, rounds=1) as bench:
            sites, tasks = bench.started(weights)
            for index in order:
                name = bench.names[index]
                arrays = {n: normal(a.shape, a.dtype, index) * (10**index) for n, a in weights.items() if n != "n"}
                typed = {n: np.asarray(a, weights[n].dtype) for n, a in arrays.items()}
                sites[name].submit(tasks[name], {**typed, "n": np.array(index)}, num_examples=EXAMPLES[index])
            final = sites["site-1"].client.next_task()
            assert final.kind == "final"
            return [array.tobytes() for array in final.arrays.values()]

    results = [result(order) for order in itertools.permutations(range(3))]
    assert all(actual == results[0] for actual in results)
