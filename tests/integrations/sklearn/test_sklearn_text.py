"""Vectorizers and target encoders over five uneven sites equal scikit-learn's on all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.feature_extraction.text as central
import sklearn.preprocessing
from sklearn.datasets import load_iris
from sklearn.model_selection import PredefinedSplit
from sklearn.utils.fixes import parse_version
from threaded_federation import run_sites
from uneven_sites import assert_same_attributes, fitted, parts, pick

import fl_adapters.sklearn as ours
from fl_adapters import ConfigError

WORDS = "patient reports mild severe pain fever cough No no Ärger 'sûr' x y z und the a of in with without".split()
RNG = np.random.default_rng(0)
NOTES = [" ".join(RNG.choice(WORDS, RNG.integers(1, 12))) for _ in range(300)]

VECTORIZERS = [
    {},
    {"min_df": 3, "max_df": 0.4},
    {"max_features": 7},
    {"ngram_range": (1, 2), "min_df": 0.02, "max_features": 40},
    {"analyzer": "char_wb", "ngram_range": (2, 3), "binary": True},
    {"lowercase": False, "stop_words": ["the", "a"]},
    {"vocabulary": ["pain", "fever", "cough"]},
]


@pytest.mark.parametrize("arguments", VECTORIZERS, ids=str)
@pytest.mark.parametrize("name", ["CountVectorizer", "TfidfVectorizer"])
def test_vectorizers(name: str, arguments: dict[str, Any]) -> None:
    plain = getattr(central, name)(**arguments)
    expected = plain.fit_transform(NOTES)
    for number, site in enumerate(fitted(getattr(ours, name)(**arguments), NOTES, method="fit_transform")):
        assert {term: int(place) for term, place in site.vocabulary_.items()} == plain.vocabulary_
        assert site.fixed_vocabulary_ == plain.fixed_vocabulary_
        np.testing.assert_allclose(site.transform(NOTES).toarray(), expected.toarray(), rtol=1e-12)
        own = expected[parts(len(NOTES))[number]]
        np.testing.assert_allclose(site.transformed.toarray(), own.toarray(), rtol=1e-12)
        assert site.transformed.dtype == expected.dtype
        assert list(site.get_feature_names_out()) == list(plain.get_feature_names_out())


@pytest.mark.parametrize("arguments", [{}, {"smooth_idf": False}, {"use_idf": False}], ids=str)
def test_weights_of_terms(arguments: dict[str, Any]) -> None:
    counts = central.CountVectorizer().fit_transform(NOTES)
    plain = central.TfidfTransformer(**arguments).fit(counts)
    site = fitted(ours.TfidfTransformer(**arguments), counts)[3]
    assert_same_attributes(site, plain)
    np.testing.assert_allclose(site.transform(counts).toarray(), plain.transform(counts).toarray())


def test_a_site_without_terms_and_no_terms_at_all() -> None:
    notes = [["fever and cough"], ["?"]]

    def site(federation: Any) -> Any:
        with ours.over(federation):
            return ours.CountVectorizer().fit(notes[federation.site.index])

    assert [sorted(one.vocabulary_) for one in run_sites(2, site)] == [["and", "cough", "fever"]] * 2
    with pytest.raises(ConfigError, match="no term is left"):
        fitted(ours.CountVectorizer(min_df=500), NOTES)


IRIS, KIND = load_iris(return_X_y=True)
FLOWERS = pd.DataFrame({"width": np.round(IRIS[:, 1] * 2).astype(int), "length": np.round(IRIS[:, 2]).astype(str)})
FLOWERS.iloc[::17, 1] = None
TARGETS = {
    "binary": np.array(["no", "yes"])[(KIND == 2).astype(int)],
    "multiclass": np.array(["a", "b", "c"])[KIND],
    "continuous": IRIS[:, 3] + 0.01,
}


@pytest.mark.parametrize("smooth", ["auto", 0.0, 5.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_means_of_the_target(kind: str, smooth: Any) -> None:
    y = TARGETS[kind]
    plain = sklearn.preprocessing.TargetEncoder(smooth=smooth).fit(FLOWERS, y)
    for site in fitted(ours.TargetEncoder(smooth=smooth), FLOWERS, y):
        assert_same_attributes(site, plain)
        np.testing.assert_allclose(site.transform(FLOWERS), plain.transform(FLOWERS))
        assert list(site.get_feature_names_out()) == list(plain.get_feature_names_out())


@pytest.mark.parametrize("kind", TARGETS)
def test_cross_fitting_over_the_folds_of_all_sites(kind: str) -> None:
    """Each row is encoded by the rows of all sites that are not in its fold."""
    if parse_version(sklearn.__version__) < parse_version("1.9"):
        pytest.skip("this scikit-learn takes a number of folds alone")
    y, folds = TARGETS[kind], RNG.integers(0, 3, len(KIND))
    shares = parts(len(KIND))
    folds[shares[4]] = [0, 1, 2, 0, 1]

    def site(federation: Any) -> Any:
        own = shares[federation.site.index]
        with ours.over(federation):
            encoder = ours.TargetEncoder(cv=PredefinedSplit(folds[own]))
            return encoder.fit_transform(pick(FLOWERS, own), y[own])

    found = run_sites(len(shares), site)
    for fold in range(3):
        plain = sklearn.preprocessing.TargetEncoder().fit(FLOWERS[folds != fold], y[folds != fold])
        for own, encoded in zip(shares, found, strict=True):
            rows = folds[own] == fold
            if rows.any():
                np.testing.assert_allclose(encoded[rows], plain.transform(FLOWERS.iloc[own[rows]]))


def test_folds_of_each_sites_own() -> None:
    site = fitted(ours.TargetEncoder(cv=2), FLOWERS, TARGETS["binary"], method="fit_transform")[0]
    assert site.transformed.shape == (len(parts(len(KIND))[0]), 2)
