"""Areas under curves from merged histograms equal scikit-learn's on the pooled data, at every scale of the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fl_runtime.aggregation.metrics.pooling import pooled, to_json
from fl_runtime.aggregation.metrics.score_histogram import MAX_BINS, score_histogram
from fl_runtime.types import Array, Summary


def areas(sites: list[tuple[Array, Array, Array]]) -> tuple[float, float]:
    histograms = [score_histogram(*site) for site in sites]
    for found in histograms:
        assert len(found) <= MAX_BINS and list(found) == sorted(found)
        assert all(type(name) is int for name in found)
        to_json({"auc": Summary("auc", 0.5, 1.0, found)})
    parts = [({"auc": Summary("auc", 0.5, 1.0, h), "aucpr": Summary("aucpr", 0.5, 1.0, h)}, 1) for h in histograms]
    values = pooled(parts)
    return values["auc"], values["aucpr"]


def wanted(sites: list[tuple[Array, Array, Array]]) -> tuple[float, float]:
    scores, positive, weights = (np.concatenate(parts) for parts in zip(*sites, strict=True))
    return (
        roc_auc_score(positive, scores, sample_weight=weights),
        average_precision_score(positive, scores, sample_weight=weights),
    )


def site(draw: Any, size: int, shift: float = 0.0, rate: float = 0.3) -> tuple[Array, Array, Array]:
    positive = draw.random(size) < rate
    scores = (draw.normal(size=size) + 2.3 * positive + shift).astype(np.float32)
    return scores, positive, draw.integers(1, 4, size).astype(float)


@pytest.mark.parametrize("size", [3_000, 60_000])
@pytest.mark.parametrize("exponent", range(-6, 7))
def test_the_scale_does_not_matter(exponent: int, size: int) -> None:
    draw = np.random.default_rng([exponent + 6, size])
    sites = [site(draw, size), site(draw, size // 2, 0.4, 0.1), site(draw, size // 3, -0.7, 0.6)]
    sites = [(scores * np.float32(10.0**exponent), positive, weights) for scores, positive, weights in sites]
    np.testing.assert_allclose(areas(sites), wanted(sites), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [3_000, 60_000])
def test_scales_may_mix_and_lie_far_from_zero(size: int) -> None:
    draw = np.random.default_rng(size)
    for change in (
        lambda x, site: -4 + x * np.float32(1e-4),
        lambda x, site: x * np.float32(10.0) ** draw.integers(-6, 7, len(x)),
        lambda x, site: x * np.float32(10.0 ** (6 - 6 * site)),
    ):
        sites = [site(draw, size), site(draw, size // 2, 0.4, 0.1), site(draw, size // 3, -0.7, 0.6)]
        changed = [(np.asarray(change(x, i), np.float32), p, w) for i, (x, p, w) in enumerate(sites)]
        np.testing.assert_allclose(areas(changed), wanted(changed), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [3_000, 60_000])
def test_equal_scores_count_half(size: int) -> None:
    """Of the area under the ROC curve alone: scikit-learn's average precision does not interpolate within ties."""
    draw = np.random.default_rng(size)
    for change in (
        lambda x: np.round(x, 1),
        lambda x: np.where(draw.random(len(x)) < 0.5, np.float32(0.5), np.float32(0.5) + x * np.float32(1e-5)),
        lambda x: np.full_like(x, 3.0),
        lambda x: np.where(draw.random(len(x)) < 0.5, np.float32(0.0), -np.abs(x) * np.float32(0.0)),
    ):
        sites = [site(draw, size), site(draw, size // 2, 0.4, 0.1), site(draw, size // 3, -0.7, 0.6)]
        changed = [(np.asarray(change(x), np.float32), p, w) for x, p, w in sites]
        np.testing.assert_allclose(areas(changed)[0], wanted(changed)[0], rtol=0, atol=1e-3)


def test_few_scores_are_exact() -> None:
    draw = np.random.default_rng(1)
    sites = [site(draw, 200), site(draw, 100)]
    np.testing.assert_allclose(areas(sites)[0], wanted(sites)[0], rtol=0, atol=1e-12)
