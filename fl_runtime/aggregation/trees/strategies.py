"""Strategies for boosted trees: sites grow trees, and the server combines them. The server does not need XGBoost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fl_runtime.aggregation.metrics.quantiles import QuantileSummary, merged
from fl_runtime.aggregation.spec import Described
from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.checks import WRONG_TYPES, check_model
from fl_runtime.aggregation.trees.document import (
    NAMES,
    TreeModel,
    base_score,
    pooled_base_score,
    scaled,
    with_base_score,
)
from fl_runtime.errors import ProtocolError, RoundFailedError, UpdateRefusedError
from fl_runtime.types import Aggregator, Allocate, Array, Arrays, Content, ServerState, Settings, Update

ENCODING = "xgboost-trees"

FAILED = "fl_adapters.failed"
"""Attribute of a model whose site could not complete the round; its value is the reason."""

WEIGHT = "weight"
"""Extra of an update for the initial model: sum of the weights of the site's rows, float64[1]."""

BASE_SUMS = "base_sums"
"""Extra of an update for the initial model: what `pooled_base_score` sums, float64, empty if it does not apply."""

ROW_WEIGHT = "row_weight"
"""Extra of an update in bagging: mean weight of the site's rows, float64[1]; absent if rows have no weights."""


_MAX_WEIGHT = 2.0**63  # far more than the rows of any site weigh, and sums of it stay finite


@dataclass(frozen=True)
class TreeStrategy(Described):
    """Base of the strategies for trees.

    Attributes:
        content: What updates hold: "encoded".
        initial: Whose contributions the initial model is made of: "all" sites'.
        linear: Always false: the strategy needs every update.
        weighted: Whether `site_weights` of the job have an effect: no.
        shows: What of a single site other sites get: its trees; in histogram mode, parts of its histograms.
    """

    content: ClassVar[Content] = "encoded"
    initial: ClassVar[Literal["first", "all", "none"]] = "all"
    linear: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    shows: ClassVar[Literal["", "trees", "updates"]] = "trees"

    def agreed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return -1 for every dimension, since tree models grow."""
        return (-1,) * len(shape)

    def check(self, update: Update) -> None:
        """Refuse malformed updates. Every tree is read, since a malformed one would reach every other site."""
        where = f"update of {update.site}, round {update.round}"
        if (update.content, update.encoding) != ("encoded", ENCODING):
            raise UpdateRefusedError(
                f"the update has the content {update.content!r} in the encoding {update.encoding[:60]!r}, but the "
                f"strategy {self.name} needs trees",
                where=where,
                fix="use an adapter that supports this strategy",
            )
        try:
            model = TreeModel.from_arrays(update.arrays)
            check_model(model)
            if update.round == 0 and not (
                np.isfinite(base_score(model.head)).all() and 0 <= _weight(update) <= _MAX_WEIGHT
            ):
                raise ProtocolError("the base score of the update is not a finite number, or its weight is no number")
            if not (np.isfinite(_base_sums(update)).all() and 0 <= _row_weight(update) <= _MAX_WEIGHT):
                raise ProtocolError("the sums for the base score or the row weight of the update are not valid numbers")
        except (ProtocolError, UpdateRefusedError) as error:
            raise UpdateRefusedError(error.what, where=where, fix=error.fix) from None
        except WRONG_TYPES:
            raise UpdateRefusedError("the update does not hold a tree model", where=where) from None

    def export(self, arrays: Arrays) -> tuple[str, bytes] | None:
        """Return the model as a UBJSON file of XGBoost."""
        return "model.ubj", TreeModel.from_arrays(arrays).document()


@dataclass(frozen=True)
class TreeBagging(TreeStrategy):
    """Every site boosts on the global model, and the new trees of all sites are appended to it.

    The leaves of a tree are scaled by its site's share of the examples, so the step of a round is the weighted mean of
    the sites' steps. Where rows have weights, an example counts with the mean weight of its site. A cap on shares
    (`max_share`) holds for the trees of a round and for the common base score. It has no arguments.
    Sites need the capability "tree-bagging" (XGBoost, mode="bagging").
    """

    name: ClassVar[str] = "tree-bagging"
    requires: ClassVar[frozenset[str]] = frozenset({"tree-bagging"})

    def weights_of(self, updates: Sequence[Update]) -> Sequence[float]:
        """Return the weights of the sites' rows; for the initial model, those behind the base score."""
        if updates and updates[0].round == 0:
            return [_weight(update) * update.site_weight for update in updates]
        return _tree_weights([(u.num_examples, _row_weight(u), u.site_weight) for u in updates])

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        return {}

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        return _Appending(base, allocate) if base else _Beginning(allocate)


@dataclass(frozen=True)
class TreeCyclic(TreeStrategy):
    """In each round one site boosts, in turn, and its trees are appended to the global model.

    The setting `turn` of a task names that site. If it drops out, the round is opened again with the sites that are
    left. It has no arguments. Sites need the capability "tree-cyclic" (XGBoost, mode="cyclic").
    """

    name: ClassVar[str] = "tree-cyclic"
    requires: ClassVar[frozenset[str]] = frozenset({"tree-cyclic"})

    def cohort(self, updates: int) -> int:
        """Return 1: the new trees of a model are those of one site."""
        return min(1, updates)

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        return {"turn": sites[(round - 1) % len(sites)]} if round > 0 and sites else {}

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        return _Appending(base, allocate, only=config["turn"]) if base else _Beginning(allocate)


@dataclass(frozen=True)
class TreeHistogram(TreeStrategy):
    """The sites grow the same trees together, by summing histograms among themselves; the server stores the trees.

    The setting `members` of a task names the sites that do so in its round. If one of them does not complete it, no
    trees count and the round is opened again. The initial model carries cut points made from the quantile summaries of
    all sites. It has no arguments. Sites need the capability "tree-histogram" (XGBoost, mode="histogram").
    """

    name: ClassVar[str] = "tree-histogram"
    scalable: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"tree-histogram"})

    def configure(self, round: int, sites: Sequence[str]) -> Settings:
        return {"members": list(sites)} if round > 0 else {}

    def check(self, update: Update) -> None:
        super().check(update)
        if update.round == 0:
            try:
                QuantileSummary.from_arrays(update.extras)
            except ProtocolError as error:
                raise UpdateRefusedError(error.what, where=f"update of {update.site}, round 0") from None

    def aggregator(self, base: Arrays, allocate: Allocate, config: Settings, state: ServerState) -> Aggregator:
        return _Together(base, allocate, config["members"]) if base else _BeginningWithCuts(allocate)


class _Beginning:
    """The aggregator of round 0: a model without trees (or the one that all sites continue) and a common base score.

    Where all sites send sums, the base score is computed from these, as XGBoost would from all rows together. Otherwise
    it is the mean of the sites' own, weighted by the weights of their rows.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._model: TreeModel | None = None
        self._sum: list[float] = []
        self._weight = 0.0
        self._base_sums: list[Array] = []
        self._distinct_scores = set[str]()

    def add(self, update: Update) -> None:
        model = TreeModel.from_arrays(update.arrays)
        scores, weight = base_score(model.head), _weight(update) * update.site_weight
        if self._model is None:
            self._model = TreeModel(model.head, tuple(bytes(tree) for tree in model.trees))
            self._sum = [0.0] * len(scores)
        if len(scores) != len(self._sum):
            raise UpdateRefusedError(
                f"the base score has {len(scores)} numbers, but that of other sites has {len(self._sum)}",
                where=f"site {update.site}",
                fix="use the same objective at every site, and XGBoost either before 3.1 or from 3.1 on everywhere",
            )
        self._sum = [total + score * weight for total, score in zip(self._sum, scores, strict=True)]
        self._weight += weight
        self._base_sums.append(_base_sums(update) * update.site_weight)
        self._distinct_scores.add(str(model.head["learner"]["learner_model_param"]["base_score"]))

    def result(self) -> tuple[Arrays, Arrays]:
        assert self._model is not None
        scores = base_score(self._model.head)
        if len(self._distinct_scores) > 1 and self._weight:
            if all(len(sums) == len(scores) for sums in self._base_sums):
                scores = pooled_base_score(self._model.head, np.sum(self._base_sums, axis=0), self._weight)
            else:
                scores = [total / self._weight for total in self._sum]
        if not np.isfinite(np.asarray(scores, np.float32)).all():
            raise RoundFailedError(
                "the base score of all sites together is not finite",
                fix="pass the same base_score in params at every site, such as 0.5, or look at the labels of the sites",
            )
        model = TreeModel(with_base_score(self._model.head, scores), self._model.trees)
        return _stored(model, self._allocate, self._further_arrays())

    def _further_arrays(self) -> Arrays:
        return {}


class _BeginningWithCuts(_Beginning):
    def __init__(self, allocate: Allocate) -> None:
        super().__init__(allocate)
        self._summaries: list[QuantileSummary] = []

    def add(self, update: Update) -> None:
        super().add(update)
        self._summaries.append(
            QuantileSummary.from_arrays({name: np.copy(array) for name, array in update.extras.items()})
        )

    def _further_arrays(self) -> Arrays:
        return merged(self._summaries)


class _Together:
    """The aggregator of histogram rounds: all members must send the same trees."""

    def __init__(self, base: Arrays, allocate: Allocate, members: Sequence[str]) -> None:
        self._base, self._allocate, self._members = base, allocate, members
        self._complete: dict[str, bytes] = {}
        self._first: Update | None = None
        self._failures: list[str] = []

    def add(self, update: Update) -> None:
        model = TreeModel.from_arrays(update.arrays)
        error = model.head["learner"]["attributes"].get(FAILED)
        if error is not None:
            self._failures.append(f"{update.site}: {error[:200]}")
        elif update.site in self._members:
            self._complete[update.site] = hashlib.sha256(b"".join(model.trees)).digest()
            self._first = self._first or update

    def result(self) -> tuple[Arrays, Arrays]:
        missing = [name for name in self._members if name not in self._complete]
        if missing or self._first is None:
            raise RoundFailedError(
                "the sites could not grow the trees of this round; none came from: " + ", ".join(missing),
                where="; ".join(self._failures),
                fix="see the logs of these sites",
            )
        if len(set(self._complete.values())) > 1:
            raise RoundFailedError(
                "the sites grew different trees from the same histograms",
                fix="use the same version of XGBoost and the same parameters at every site",
            )
        appending = _Appending(self._base, self._allocate, only=self._first.site)
        appending.add(self._first)
        return appending.result()


@dataclass(frozen=True)
class _Grown:
    """The new trees of one site in a round."""

    site: str
    examples: int
    row_weight: float
    factor: float
    model: TreeModel
    trees: tuple[dict[str, Any], ...]


class _Appending:
    """The aggregator that appends new trees to the global model; with `only`, those of one site."""

    def __init__(self, base: Arrays, allocate: Allocate, only: str | None = None) -> None:
        self._base, self._allocate, self._only = TreeModel.from_arrays(base), allocate, only
        self._other_arrays = {name: array for name, array in base.items() if name not in NAMES}
        self._parts: list[_Grown] = []

    def add(self, update: Update) -> None:
        if self._only in (None, update.site):
            model = TreeModel.from_arrays(update.arrays)
            _check_same(self._base, model, update)
            trees = tuple(ubjson.loads(tree) for tree in model.trees)
            self._parts.append(
                _Grown(update.site, update.num_examples, _row_weight(update), update.site_weight, model, trees)
            )

    def result(self) -> tuple[Arrays, Arrays]:
        if not self._parts:
            raise RoundFailedError(f"no trees came from {self._only}, whose turn it was", fix="see that site's log")
        shares = self._shares()
        model, trees = dict(self._base.model), list(self._base.trees)
        info, starts = list(model["tree_info"]), list(model["iteration_indptr"])
        weights, new_weights = self._weights(shares)
        for number in range(max((part.model.rounds for part in self._parts), default=0)):
            for group, share, part, index in self._of_round(number, shares):
                if weights is not None:
                    weights.append(new_weights[part.site][index])
                trees.append(ubjson.dumps({**scaled(part.trees[index], share), "id": len(trees)}))
                info.append(group)
            starts.append(len(trees))
        model |= {"tree_info": info, "iteration_indptr": starts}
        model["gbtree_model_param"] = model["gbtree_model_param"] | {"num_trees": str(len(trees))}
        grown = TreeModel(self._base.head, tuple(trees)).with_head(model, weights)
        return _stored(grown, self._allocate, self._other_arrays)

    def _shares(self) -> list[float]:
        """Return each site's share of the step."""
        weights = _tree_weights([(part.examples, part.row_weight, part.factor) for part in self._parts])
        total = sum(weights) or 1.0
        return [weight / total for weight in weights]

    def _of_round(self, number: int, shares: list[float]) -> list[tuple[int, float, _Grown, int]]:
        """Return (class, share, part, index of the tree in it) of a local boosting round, by class, then by site."""
        trees = []
        for share, part in zip(shares, self._parts, strict=True):
            starts = part.model.model["iteration_indptr"]
            if number + 1 < len(starts):
                info = part.model.model["tree_info"]
                trees += [(int(info[i]), share, part, i) for i in range(int(starts[number]), int(starts[number + 1]))]
        return sorted(trees, key=lambda item: item[0])

    def _weights(self, shares: list[float]) -> tuple[list[float] | None, dict[str, list[float]]]:
        """Return the weights of the base's trees (dart lowers them; the sites' mean) and of each site's new trees."""
        old = self._base.weight_drop
        if old is None:
            return None, {}
        old_weights, new_weights = [], {}
        for part in self._parts:
            weights = part.model.weight_drop or []
            complete = len(weights) == len(old) + len(part.trees)
            old_weights.append(weights[: len(old)] if complete else old)
            new_weights[part.site] = weights[len(old) :] if complete else weights
        return [float(weight) for weight in np.average(old_weights, axis=0, weights=shares)], new_weights


def _check_same(base: TreeModel, grown: TreeModel, update: Update) -> None:
    """Refuse an update that no longer has the classes, features and booster that the handshake compared."""
    for what, actual, expected in (
        ("features", _param(grown, "num_feature"), _param(base, "num_feature")),
        ("classes", _param(grown, "num_class"), _param(base, "num_class")),
        ("targets", _param(grown, "num_target"), _param(base, "num_target")),
        ("booster", _booster(grown), _booster(base)),
        ("weights of trees", len(grown.weight_drop or []), _expected_weights(base, grown)),
    ):
        if actual != expected:
            raise UpdateRefusedError(
                f"an update with {what} {actual} does not extend a model with {what} {expected}",
                where=f"site {update.site}, round {update.round}",
                fix="train with the same parameters from the first round to the last",
            )


def _param(model: TreeModel, name: str) -> str:
    return str(model.head["learner"]["learner_model_param"][name])


def _booster(model: TreeModel) -> str:
    return str(model.head["learner"]["gradient_booster"]["name"])


def _expected_weights(base: TreeModel, grown: TreeModel) -> int:
    """Return the expected number of tree weights: one per new tree or per tree in all, 0 if the base has none."""
    if base.weight_drop is None:
        return 0
    new = len(grown.trees)
    return new if len(grown.weight_drop or []) == new else len(base.weight_drop) + new


def _tree_weights(parts: Sequence[tuple[int, float, float]]) -> list[float]:
    """Return the weights of trees from the (examples, mean weight of a row, factor) of their sites.

    Sites that all send 1 as their number of examples count the same, but for the factor.
    """
    equal = all(examples == 1 for examples, _, _ in parts)
    return [factor if equal else examples * row_weight * factor for examples, row_weight, factor in parts]


def _weight(update: Update) -> float:
    return float(update.extras[WEIGHT][0])


def _base_sums(update: Update) -> Array:
    return np.asarray(update.extras.get(BASE_SUMS, np.empty(0)), np.float64)


def _row_weight(update: Update) -> float:
    return float(update.extras[ROW_WEIGHT][0]) if ROW_WEIGHT in update.extras else 1.0


def _stored(model: TreeModel, allocate: Allocate, more: Arrays) -> tuple[Arrays, Arrays]:
    arrays = {**model.to_arrays(), **more}
    out, extras = allocate(arrays, {})
    for name, array in arrays.items():
        out[name][...] = array
    return out, extras
