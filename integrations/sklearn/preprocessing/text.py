"""Vectorizers of texts fitted over all sites: one vocabulary and the document frequencies of all documents."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction import text

from fl_runtime.errors import ConfigError

from ..federated import Federated, adopt, opened, plain_copy
from ..federation import Array, Federation, large_union
from ..trainer import validated


@dataclass(frozen=True)
class Vocabulary:
    """The terms of all sites, and this site's counts of them.

    Attributes:
        terms: The terms, in the order of the columns.
        counts: This site's counts, [documents, terms], sparse.
        frequencies: Number of documents of all sites with each term.
        documents: Number of documents of all sites.
    """

    terms: list[str]
    counts: Any
    frequencies: Array
    documents: int


class CountVectorizer(Federated, text.CountVectorizer):
    """`sklearn.feature_extraction.text.CountVectorizer` fitted over all sites: the vocabulary of all documents.

    Without `vocabulary=`, the sites send each of their terms once, and how many of their documents have it. `min_df`,
    `max_df` and `max_features` apply to the documents of all sites.
    """

    def fit(self, raw_documents: Any, y: Any = None) -> Any:
        self.fit_transform(raw_documents)
        return self

    def fit_transform(self, raw_documents: Any, y: Any = None) -> Any:
        with opened(self) as federation:
            if federation is None:
                return super().fit_transform(raw_documents)
            found = vocabulary_of(federation, self, raw_documents)
            take_vocabulary(self, found)
            return found.counts


class TfidfVectorizer(Federated, text.TfidfVectorizer):
    """`sklearn.feature_extraction.text.TfidfVectorizer` fitted over all sites: vocabulary and frequencies of all.

    Without `vocabulary=`, the sites send each of their terms once, and how many of their documents have it.
    """

    def fit(self, raw_documents: Any, y: Any = None) -> Any:
        self.fit_transform(raw_documents)
        return self

    def fit_transform(self, raw_documents: Any, y: Any = None) -> Any:
        with opened(self) as federation:
            if federation is None:
                return super().fit_transform(raw_documents)
            found = vocabulary_of(federation, self, raw_documents)
            take_vocabulary(self, found)
            if self.use_idf:
                self.idf_ = rarity(found.frequencies, found.documents, self.smooth_idf).astype(found.counts.dtype)
            names = ("norm", "use_idf", "smooth_idf", "sublinear_tf")
            weigh = text.TfidfTransformer(**{name: getattr(self, name) for name in names}).fit(found.counts)
            if self.use_idf:
                weigh.idf_ = self.idf_
            return weigh.transform(found.counts)


class TfidfTransformer(Federated, text.TfidfTransformer):
    """`sklearn.feature_extraction.text.TfidfTransformer` fitted over all sites: document frequencies of all."""

    def fit(self, X: Any, y: Any = None) -> Any:
        with opened(self, X) as federation:
            return super().fit(X, y) if federation is None else self._fit_on(federation, X)

    def _fit_on(self, federation: Federation, X: Any) -> Any:
        X = sparse.csr_matrix(validated(self, X, accept_sparse=("csr", "csc")))
        if self.use_idf:
            frequencies, documents = frequencies_of(federation, X)
            dtype = X.dtype if X.dtype in (np.float64, np.float32) else np.float64
            self.idf_ = rarity(frequencies, documents, self.smooth_idf).astype(dtype)
        return self


def frequencies_of(federation: Federation, counts: Any) -> tuple[Array, int]:
    """Return how many documents of all sites have each term, and how many there are."""
    own = np.bincount(counts.indices, minlength=counts.shape[1]).astype(np.float64)
    totals = federation.sum({"frequencies": own, "documents": np.array([counts.shape[0]], float)})
    return totals["frequencies"], int(totals["documents"][0])


def rarity(frequencies: Array, documents: int, smooth: bool) -> Array:
    """Return the inverse document frequencies, as scikit-learn defines them."""
    return np.asarray(np.log((documents + int(smooth)) / (frequencies + float(smooth))) + 1.0)


def vocabulary_of(federation: Federation, estimator: Any, documents: Any) -> Vocabulary:
    """Count this site's terms, and agree on the terms of all sites.

    Args:
        federation: The federation.
        estimator: The vectorizer.
        documents: This site's documents.

    Raises:
        ConfigError: No site has a term, or `min_df` and `max_df` leave none.
    """
    own_terms, counts = _own_counts(estimator, documents)
    if estimator.vocabulary is not None:
        frequencies, total = frequencies_of(federation, counts)
        return Vocabulary(own_terms, counts, frequencies, total)
    sent = large_union(federation, [json.dumps(term) for term in own_terms])  # ASCII, whatever the terms are
    terms = sorted(map(json.loads, sent))
    place = {term: number for number, term in enumerate(terms)}
    columns = np.array([place[term] for term in own_terms], np.int64)
    shape = (counts.shape[0], len(terms))
    counts = sparse.csr_matrix((counts.data, columns[counts.indices], counts.indptr), shape=shape)
    counts.sort_indices()
    frequencies, total = frequencies_of(federation, counts)
    kept = _kept(federation, estimator, counts, frequencies, total)
    if not len(kept):
        raise ConfigError(
            "no term is left of the documents of all sites",
            where=f"{type(estimator).__name__}.fit",
            fix="lower min_df, or raise max_df",
        )
    return Vocabulary([terms[number] for number in kept], counts[:, kept], frequencies[kept], total)


def _kept(federation: Federation, estimator: Any, counts: Any, frequencies: Array, total: int) -> Any:
    """Numbers of the terms that min_df, max_df and max_features leave."""
    limits = (estimator.min_df, estimator.max_df)
    low, high = (float(limit if isinstance(limit, Integral) else limit * total) for limit in limits)
    left = np.flatnonzero((frequencies >= low) & (frequencies <= high))
    most = estimator.max_features
    if most is None or len(left) <= most:
        return left
    occurrences = federation.sum({"occurrences": np.asarray(counts.sum(axis=0), np.float64).ravel()})["occurrences"]
    sizes = occurrences.astype(np.asarray(counts[:0].sum(axis=0)).dtype)  # ties fall as scikit-learn's sort lets them
    return np.sort(left[(-sizes[left]).argsort()[:most]])


def _own_counts(estimator: Any, documents: Any) -> tuple[list[str], Any]:
    """This site's terms, in the order of the columns, and its counts of them."""
    arguments = {name: value for name, value in estimator.get_params(deep=False).items() if name in _COUNTING}
    counter = text.CountVectorizer(**{**arguments, "min_df": 1, "max_df": 1.0, "max_features": None})
    try:
        counts = sparse.csr_matrix(counter.fit_transform(documents))
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return [], sparse.csr_matrix((len(documents), 0), dtype=estimator.dtype)
    return list(counter.get_feature_names_out()), counts


_COUNTING = frozenset(inspect.signature(text.CountVectorizer).parameters)


def take_vocabulary(estimator: Any, found: Vocabulary) -> None:
    """Set what scikit-learn's own `fit` sets, by fitting it with the vocabulary on one empty document."""
    vocabulary = {term: number for number, term in enumerate(found.terms)}
    simple = {"input": "content", "analyzer": "word", "preprocessor": None, "tokenizer": None}
    adopt(estimator, plain_copy(estimator, vocabulary=vocabulary, **simple).fit([""]))
    estimator.fixed_vocabulary_ = estimator.vocabulary is not None
