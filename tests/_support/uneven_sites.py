"""Rows shared out to five sites of very different sizes, and estimators fitted by them in threads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from threaded_federation import ThreadedFederation, run_sites

from fl_adapters.sklearn import over

SHARES = (0.45, 0.3, 0.15, 0.07, 0.03)


def parts(rows: int, seed: int = 0) -> list[Any]:
    """Return the row numbers of each site: a random partition into five uneven parts."""
    order = np.random.default_rng(seed).permutation(rows)
    return np.split(order, np.floor(np.cumsum(SHARES)[:-1] * rows).astype(int))


def pick(table: Any, rows: Any) -> Any:
    """Return some rows of a frame, a matrix or a list."""
    if hasattr(table, "iloc"):
        return table.iloc[rows]
    return table[rows] if hasattr(table, "shape") else [table[row] for row in rows]


def fitted(estimator: Any, table: Any, *more: Any, method: str = "fit", **columns: Any) -> list[Any]:
    """Fit a copy of an estimator at five sites, each with its share of the rows; return the sites' estimators.

    Args:
        estimator: Unfitted estimator of `fl_adapters.sklearn`, or a pipeline with some.
        table: All rows.
        *more: All targets.
        method: "fit" or "fit_transform"; the result of the latter is kept as `transformed` of the estimator.
        **columns: Further arguments, one value for each row.
    """
    shares = parts(table.shape[0] if hasattr(table, "shape") else len(table))

    def site(federation: ThreadedFederation) -> Any:
        own, rows = copy.deepcopy(estimator), shares[federation.site.index]
        with over(federation):
            given = {name: pick(values, rows) for name, values in columns.items()}
            result = getattr(own, method)(pick(table, rows), *(pick(y, rows) for y in more), **given)
        if method != "fit":
            own.transformed = result
        return own

    return run_sites(len(shares), site)


def assert_same_attributes(found: Any, expected: Any, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Assert that an estimator has the fitted attributes of another one, with the same types of values."""
    names = {name for name in vars(expected) if name.endswith("_") and not name.startswith("_")}
    assert names <= set(vars(found)), names - set(vars(found))
    for name in sorted(names):
        _same(getattr(found, name), getattr(expected, name), name, rtol, atol)


def _same(found: Any, expected: Any, name: str, rtol: float, atol: float) -> None:
    if isinstance(expected, list | tuple) or (isinstance(expected, np.ndarray) and expected.dtype == object):
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            _same(one, other, name, rtol, atol)
    elif isinstance(expected, np.ndarray | np.generic | float):
        assert np.shape(found) == np.shape(expected), name
        if name != "n_samples_seen_":  # an integer or a float, by the version of scikit-learn
            assert np.asarray(found).dtype == np.asarray(expected).dtype, name
        if np.asarray(expected).dtype.kind in "fc":
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)
    elif isinstance(expected, dict):
        assert dict(found) == dict(expected), name
    elif not hasattr(expected, "get_params"):
        assert found == expected, name
