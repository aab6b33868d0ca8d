"""Rings against Python's whole numbers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.secure_sum import Ring, count_beyond
from fl_runtime.types import Array

BITS = [32, 64, 128, 256]


def numbers(ring: Ring, array: Array) -> list[int]:
    """The signed whole numbers that an array of a ring holds."""
    rows = array.reshape(-1, ring.words)
    found = [sum(int(word) << 64 * place for place, word in enumerate(row)) for row in rows]
    return [each - 2**ring.bits if each >= 2 ** (ring.bits - 1) else each for each in found]


def of_numbers(ring: Ring, values: list[int]) -> Array:
    """The array of a ring that holds whole numbers, of any sign."""
    if ring.words > 1:
        rows = [[(each % 2**ring.bits >> 64 * place) % 2**64 for place in range(ring.words)] for each in values]
        return np.array(rows, np.uint64).reshape(-1, ring.words)
    return np.array([each % 2**ring.bits for each in values], ring.dtype)


@given(st.sampled_from(BITS), st.integers(0, 40), st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8))
def test_floats_become_the_nearest_whole_number(bits: Any, fraction_bits: int, values: list[float]) -> None:
    ring = Ring(bits, fraction_bits)
    exact = [round(Fraction(value) * 2**fraction_bits) for value in values]  # ties to even, as Ring says
    if any(abs(each) >= 2 ** (bits - 1) for each in exact):
        with pytest.raises(UpdateRefusedError, match="too large"):
            ring.encode(np.array(values))
    else:
        assert numbers(ring, ring.encode(np.array(values))) == exact


@given(st.sampled_from(BITS), st.integers(0, 140), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_integers_are_exact(bits: Any, fraction_bits: int, values: list[int]) -> None:
    ring = Ring(bits, fraction_bits)
    exact = [value << fraction_bits for value in values]
    if any(abs(each) >= 2 ** (bits - 1) for each in exact):
        with pytest.raises(UpdateRefusedError):
            ring.encode(np.array(values, np.int64))
    else:
        assert numbers(ring, ring.encode(np.array(values, np.int64))) == exact


@given(st.sampled_from(BITS), st.integers(0, 140), st.data())
def test_decoding_rounds_once(bits: Any, fraction_bits: int, data: st.DataObject) -> None:
    ring = Ring(bits, fraction_bits)
    limit = 2 ** (bits - 1)
    near = st.builds(
        lambda high, low, shift: (high << shift) + low, st.integers(1, 2**54), st.integers(-1, 1), st.integers(0, 73)
    )
    values = data.draw(st.lists(st.integers(-limit, limit - 1) | near, min_size=1, max_size=8))
    values = [value for value in values if abs(value) < limit]
    decoded = ring.decode(of_numbers(ring, values))
    assert decoded.tolist() == [float(Fraction(value, 2**fraction_bits)) for value in values]


@given(
    st.sampled_from(BITS),
    st.lists(st.tuples(st.integers(-(2**255), 2**255), st.integers(-(2**255), 2**255)), min_size=1),
)
def test_sums_and_differences_wrap(bits: Any, pairs: list[tuple[int, int]]) -> None:
    ring = Ring(bits, 0)
    first, second = (of_numbers(ring, list(column)) for column in zip(*pairs, strict=True))
    total = first.copy()
    ring.add_into(total, second)
    assert np.array_equal(total, of_numbers(ring, [one + other for one, other in pairs]))
    ring.subtract_from(total, second)
    assert np.array_equal(total, first)
    ring.subtract_from(total, second)
    assert np.array_equal(total, of_numbers(ring, [one - other for one, other in pairs]))


@given(st.sampled_from(BITS), st.integers(1, 300), st.floats(1e-30, 1e12), st.floats(1e-3, 1e9))
def test_a_sum_at_its_bound_does_not_wrap(bits: Any, sites: int, bound: float, weight: float) -> None:
    total, half = Fraction(bound) * Fraction(weight), Fraction(sites, 2)  # each site is rounded by at most 1 / 2
    limit = 2 ** (bits - 1)
    if total + half + 2 > limit:
        assume(total + half + 2 > limit + 4)  # at the limit itself either is right
        with pytest.raises(ConfigError, match="does not fit"):
            Ring.for_sum(sites, bound, weight, bits)
        return
    ring = Ring.for_sum(sites, bound, weight, bits)
    assert total * 2**ring.fraction_bits + half < limit
    assert total * 2 ** (ring.fraction_bits + 1) + half + 2 > limit or ring.fraction_bits == 512


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8, np.uint64, np.bool_]
)
@pytest.mark.parametrize("bits", BITS)
def test_all_real_dtypes_work(bits: Any, dtype: Any) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    ring = Ring(bits, 8)
    encoded = ring.encode(values)
    assert encoded.dtype == ring.dtype and encoded.shape == ring.zeros(values.shape).shape
    assert np.array_equal(ring.decode(encoded), values.astype(np.float64))


@pytest.mark.parametrize("bits", BITS)
def test_numbers_without_a_dimension_and_empty_arrays_work(bits: Any) -> None:
    ring = Ring(bits, 3)
    for shape in [(), (0,), (2, 0)]:
        total = ring.encode(np.full(shape, -1.5))
        ring.add_into(total, ring.encode(np.full(shape, 2.5)))
        assert ring.decode(total).shape == shape
        assert np.all(ring.decode(total) == 1.0)


def test_values_beyond_the_bound_are_counted() -> None:
    assert count_beyond(np.array([1.0, -2.0, 2.5, math.nan, math.inf], np.float32), 2.0) == 3
    assert count_beyond(np.array([-(2**63), 3]), 5.0) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**63])
@pytest.mark.parametrize("bits", [32, 64])
def test_what_does_not_fit_is_refused(value: float, bits: Any) -> None:
    with pytest.raises(UpdateRefusedError):
        Ring(bits, 0).encode(np.array([value]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sites": 0, "bound": 1.0}, "sites=0"),
        ({"sites": 3, "bound": math.inf}, "bound=inf"),
        ({"sites": 3, "bound": 1.0, "weight": -1.0}, "weight=-1"),
        ({"sites": 3, "bound": 1e12, "weight": 1e9}, "bound=1e\\+12 with weights that sum up to 1e\\+09"),
        ({"sites": 3, "bound": 1.0, "bits": 32, "least_fraction_bits": 31}, "into 32 bits with 31"),
    ],
)
def test_the_value_that_does_not_fit_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Ring.for_sum(**arguments)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ConfigError, match="complex"):
        Ring(64, 0).encode(np.array([1j]))
    with pytest.raises(ConfigError, match="bits=16"):
        Ring(16, 0)  # type: ignore[arg-type]
