"""Robust means of finite values are finite: the oracle is exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fl_runtime.aggregation import make_strategy
from fl_runtime.types import Array, ServerState, Update


def aggregated(spec: str, values: list[Array]) -> Array:
    base = {"w": np.zeros_like(values[0])}
    out = {"w": np.empty_like(values[0])}
    aggregator = make_strategy(spec).aggregator(base, lambda arrays, extras: (out, {}), {}, ServerState())
    for number, value in enumerate(values):
        aggregator.add(Update("job", 1, "", f"site-{number}", 1, 0, {"w": value}, 1))
    aggregator.result()
    return out["w"]


def exact(values: list[Array], cut: int) -> list[Fraction]:
    columns = np.stack([value.astype(np.float64) for value in values]).T
    kept = [sorted(map(Fraction, column.tolist()))[cut : len(values) - cut] for column in columns]
    return [sum(column, Fraction(0)) / len(column) for column in kept]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sites", [2, 4, 5, 10, 17])
@pytest.mark.parametrize("spec", ["median", "trimmed-mean:trim=0.2"])
def test_finite_values_have_a_finite_mean(spec: str, sites: int, dtype: Any) -> None:
    draw, largest = np.random.default_rng(sites), float(ml_dtypes.finfo(dtype).max)
    values = [(draw.uniform(-1, 1, 200) * largest).astype(dtype) for _ in range(sites)]
    for value in values:
        value[:20], value[20:40], value[180:] = largest, -largest, draw.normal(size=20).astype(dtype)
    cut = (sites - 1) // 2 if spec == "median" else int(0.2 * sites + 1e-9)
    found = aggregated(spec, values)
    assert np.isfinite(found.astype(np.float64)).all()
    tolerance = Fraction(float(ml_dtypes.finfo(dtype).eps)) * sites
    scale = [max(abs(Fraction(float(value[i]))) for value in values) for i in range(200)]
    for mean, wanted, size in zip(found.astype(np.float64).tolist(), exact(values, cut), scale, strict=True):
        assert abs(Fraction(mean) - wanted) <= tolerance * size
