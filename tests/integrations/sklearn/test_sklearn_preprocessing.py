"""Scalers, encoders and imputers over five uneven sites equal scikit-learn's on all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.impute
import sklearn.preprocessing as central
from scipy import sparse
from sklearn.datasets import load_breast_cancer
from threaded_federation import run_sites
from uneven_sites import assert_same_attributes, fitted

import fl_adapters.sklearn as ours
from fl_adapters.loop.order import at_ranks, from_bits, to_bits

RNG = np.random.default_rng(3)
CANCER = load_breast_cancer().data
HOLES = np.where(RNG.random(CANCER.shape) < 0.1, np.nan, CANCER)
HOLES[:, 3] = 7.1  # constant
HOLES[:, 5] = np.round(HOLES[:, 5], 1)
TABLE = pd.DataFrame(
    {
        "colour": RNG.choice(["red", "green", "blue", "rare-1", "rare-2"], 600, p=[0.5, 0.3, 0.19, 0.005, 0.005]),
        "size": RNG.integers(0, 7, 600),
        "weight": RNG.choice([0.1, 0.30000000000000004, 1e-300, 12345.678], 600),
        "flag": RNG.random(600) < 0.3,
        "maybe": RNG.choice(np.array(["a", "b", None], dtype=object), 600),
    }
)


@pytest.mark.parametrize(
    "estimator",
    [
        ours.StandardScaler(),
        ours.StandardScaler(with_mean=False),
        ours.StandardScaler(with_std=False),
        ours.MinMaxScaler((-1, 2)),
        ours.MaxAbsScaler(),
        ours.RobustScaler(),
        ours.RobustScaler(quantile_range=(10.0, 81.0), unit_variance=True),
        ours.QuantileTransformer(n_quantiles=100),
        ours.SimpleImputer(),
        ours.SimpleImputer(strategy="median", add_indicator=True),
        ours.SimpleImputer(strategy="constant", fill_value=-1.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_columns_with_missing_values(estimator: Any, dtype: Any) -> None:
    X = HOLES.astype(dtype)
    single = dtype == np.float32
    plain = ours.as_sklearn(estimator).fit(X)
    sites = fitted(estimator, X)
    for site in sites:
        assert_same_attributes(site, plain, rtol=1e-5 if single else 1e-9)
        np.testing.assert_allclose(site.transform(X), plain.transform(X), rtol=1e-4 if single else 1e-9, atol=1e-9)


def test_all_sites_have_the_same_bits() -> None:
    sites = fitted(ours.StandardScaler(), HOLES)
    assert len({site.mean_.tobytes() + site.scale_.tobytes() for site in sites}) == 1


def test_large_means_cost_no_digits() -> None:
    X = CANCER + 1e9
    exact = np.var(X.astype(np.longdouble), axis=0).astype(np.float64)
    np.testing.assert_allclose(fitted(ours.StandardScaler(), X)[0].var_, exact, rtol=1e-9)


def test_weights_of_rows() -> None:
    weights = RNG.random(len(CANCER))
    plain = central.StandardScaler().fit(CANCER, sample_weight=weights)
    assert_same_attributes(fitted(ours.StandardScaler(), CANCER, sample_weight=weights)[2], plain)


@pytest.mark.parametrize("estimator", [ours.StandardScaler(with_mean=False), ours.MaxAbsScaler()], ids=repr)
def test_sparse_rows(estimator: Any) -> None:
    X = sparse.random(300, 20, 0.2, format="csr", random_state=0)
    assert_same_attributes(fitted(estimator, X)[1], ours.as_sklearn(estimator).fit(X))


@pytest.mark.parametrize("encode", ["onehot", "onehot-dense", "ordinal"])
@pytest.mark.parametrize("strategy", ["uniform", "quantile", "kmeans"])
def test_bins(encode: str, strategy: str) -> None:
    X = np.hstack([CANCER[:, :6], np.ones((len(CANCER), 1)), np.round(CANCER[:, :1])])
    arguments = {"n_bins": [3, 4, 5, 6, 7, 8, 2, 9], "encode": encode, "strategy": strategy, "subsample": None}
    if hasattr(central.KBinsDiscretizer(), "quantile_method"):
        arguments["quantile_method"] = "averaged_inverted_cdf"
    with pytest.warns(UserWarning, match="constant"):
        plain = central.KBinsDiscretizer(**arguments).fit(X)
    site = fitted(ours.KBinsDiscretizer(**arguments), X)[4]
    assert_same_attributes(site, plain)
    found, expected = site.transform(X), plain.transform(X)
    np.testing.assert_array_equal(*(a.toarray() if sparse.issparse(a) else a for a in (found, expected)))


@pytest.mark.parametrize(
    "estimator",
    [
        ours.OneHotEncoder(),
        ours.OneHotEncoder(drop="first", sparse_output=False),
        ours.OneHotEncoder(min_frequency=0.02, handle_unknown="infrequent_if_exist"),
        ours.OneHotEncoder(max_categories=3),
        ours.OrdinalEncoder(),
        ours.OrdinalEncoder(min_frequency=20, handle_unknown="use_encoded_value", unknown_value=-1),
    ],
    ids=repr,
)
def test_categories(estimator: Any) -> None:
    plain = ours.as_sklearn(estimator).fit(TABLE)
    for site in fitted(estimator, TABLE):
        assert_same_attributes(site, plain)
        found, expected = site.transform(TABLE), plain.transform(TABLE)
        np.testing.assert_array_equal(*(a.toarray() if sparse.issparse(a) else a for a in (found, expected)))
        assert list(site.get_feature_names_out()) == list(plain.get_feature_names_out())
        assert getattr(site, "infrequent_categories_", None) is None or all(
            np.array_equal(a, b) for a, b in zip(site.infrequent_categories_, plain.infrequent_categories_, strict=True)
        )


def test_given_categories_and_arrays() -> None:
    X = TABLE[["colour"]].to_numpy()
    given = [["red", "rare-2", "green", "blue", "rare-1"]]
    plain = central.OneHotEncoder(categories=given, min_frequency=20).fit(X)
    site = fitted(ours.OneHotEncoder(categories=given, min_frequency=20), X)[0]
    assert_same_attributes(site, plain)
    np.testing.assert_array_equal(site.transform(X).toarray(), plain.transform(X).toarray())
    numbers = TABLE[["size", "weight"]].to_numpy()
    assert_same_attributes(fitted(ours.OrdinalEncoder(), numbers)[3], central.OrdinalEncoder().fit(numbers))


def test_a_column_without_holes_at_one_site_is_no_other_type() -> None:
    frames = [pd.DataFrame({"n": [1, 2, 3]}), pd.DataFrame({"n": [2.0, np.nan]})]
    pooled = central.OneHotEncoder().fit(pd.concat(frames))

    def site(federation: Any) -> Any:
        with ours.over(federation):
            return ours.OneHotEncoder().fit(frames[federation.site.index])

    for encoder in run_sites(2, site):
        assert_same_attributes(encoder, pooled)


def test_texts_and_numbers_in_one_column_are_refused() -> None:
    frames = [pd.DataFrame({"n": [1, 2, 3]}), pd.DataFrame({"n": ["1", "2"]})]

    def site(federation: Any) -> Any:
        with ours.over(federation):
            return ours.OneHotEncoder().fit(frames[federation.site.index])

    with pytest.raises(Exception, match="column 'n' has texts at one site and numbers at another"):
        run_sites(2, site)


def test_labels() -> None:
    y = TABLE["colour"].to_numpy()
    for labels in (y, TABLE["size"].to_numpy(), list(y)):
        plain = central.LabelEncoder().fit(labels)
        for site in fitted(ours.LabelEncoder(), labels):
            assert_same_attributes(site, plain)


def test_most_frequent_values() -> None:
    X = TABLE.drop(columns="maybe").astype(object)
    X.iloc[::7, 0] = np.nan
    X.iloc[::5, 2] = np.nan
    plain = sklearn.impute.SimpleImputer(strategy="most_frequent").fit(X)
    site = fitted(ours.SimpleImputer(strategy="most_frequent"), X)[2]
    assert_same_attributes(site, plain)
    np.testing.assert_array_equal(site.transform(X), plain.transform(X))


def test_a_column_that_is_missing_everywhere_and_one_that_is_missing_at_one_site() -> None:
    X = HOLES.copy()
    X[:, 0] = np.nan
    plain = sklearn.impute.SimpleImputer(add_indicator=True).fit(X)
    with pytest.warns(UserWarning, match="Skipping features"):
        np.testing.assert_allclose(
            fitted(ours.SimpleImputer(add_indicator=True), X)[3].transform(X), plain.transform(X)
        )


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e300])
def test_values_at_ranks_are_exact(scale: float) -> None:
    values = np.concatenate([RNG.normal(size=500) * scale, [0.0, -0.0, scale, scale]])
    np.testing.assert_array_equal(from_bits(to_bits(values)), values)
    shares = np.array_split(values, 3)
    ranks = [0, 1, 250, 502, 503]
    found = run_sites(3, lambda federation: at_ranks(federation, [shares[federation.site.index]], [ranks]))
    for site in found:
        np.testing.assert_array_equal(site[0], np.sort(values)[ranks])
