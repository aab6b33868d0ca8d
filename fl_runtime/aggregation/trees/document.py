"""Boosted tree models as arrays, and the parts of XGBoost's model document that aggregation needs.

A model travels as four arrays:

    head    uint8   the model's UBJSON document without trees
    trees   uint8   the UBJSON of each tree, one after the other
    ends    int64   offset in `trees` at which each tree ends
    sizes   int64   used lengths of the three arrays above

So trees can be appended without reading the existing ones. The arrays are padded in steps of an eighth of their length:
a growing model keeps its layout, and the server its recycled files, for many rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fl_runtime.aggregation.trees import ubjson
from fl_runtime.errors import ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.types import Array, Arrays

NAMES = ("head", "trees", "ends", "sizes")
_LEAST_SHARE = 1e-6
_MAX_CHARS = 2**31
_MAX_DEPTH = 64


@dataclass(frozen=True)
class TreeModel:
    """A boosted tree model.

    Attributes:
        head: XGBoost's model document without trees.
        trees: The encoded document of each tree.
    """

    head: dict[str, Any]
    trees: tuple[bytes | memoryview, ...] = ()

    @classmethod
    def from_document(cls, data: bytes | bytearray) -> TreeModel:
        """Read a model document.

        Args:
            data: Contents of a model file or result of `Booster.save_raw`, as UBJSON or JSON.

        Returns:
            The model.

        Raises:
            ProtocolError: If it is not a tree model of XGBoost.
        """
        text = data[1:2] in (b'"', b" ", b"\n", b"\t", b"\r")
        try:
            document = _typed(_parsed(data)) if text else ubjson.loads(data)
            model = booster_model(document)
            trees = tuple(ubjson.dumps(tree) for tree in model["trees"])
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ProtocolError("this is not a tree model of XGBoost") from None
        model["trees"] = []
        return cls(document, trees)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> TreeModel:
        """Read a model from its arrays.

        Args:
            arrays: The arrays named in `NAMES`.

        Returns:
            The model; its trees are views of the arrays.

        Raises:
            ProtocolError: If the arrays do not hold a model.
        """
        try:
            head, trees, ends = (arrays[name][:size] for name, size in zip(NAMES, arrays["sizes"], strict=False))
            cuts = [0, *ends.tolist()]
            if cuts != sorted(cuts) or cuts[-1] != len(trees) or len(arrays["sizes"]) != 3:
                raise ProtocolError("the trees of a model do not lie one after the other")
            document = ubjson.loads(head.tobytes())
            booster_model(document)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise ProtocolError("these arrays do not hold a tree model") from None
        data = np.ascontiguousarray(trees).data
        return cls(document, tuple(data[a:b] for a, b in pairwise(cuts)))

    def to_arrays(self) -> dict[str, Array]:
        """Return the model as new arrays, named as in `NAMES`."""
        head = np.frombuffer(ubjson.dumps(self.head), np.uint8)
        trees = np.frombuffer(b"".join(self.trees), np.uint8)
        ends = np.cumsum([len(tree) for tree in self.trees], dtype=np.int64)
        sizes = np.array([len(head), len(trees), len(ends)], np.int64)
        return {"head": _padded(head), "trees": _padded(trees), "ends": _padded(ends), "sizes": sizes}

    def document(self) -> bytes:
        """Return the model as UBJSON, which is the contents of a `.ubj` file and what `Booster.load_model` takes."""
        model = self.model
        model["trees"] = [ubjson.Raw(tree) for tree in self.trees]
        try:
            return ubjson.dumps(self.head)
        finally:
            model["trees"] = []

    @property
    def model(self) -> dict[str, Any]:
        """Part of `head` with `tree_info` and `iteration_indptr`."""
        return booster_model(self.head)

    @property
    def rounds(self) -> int:
        """Number of boosting rounds."""
        return len(self.model["iteration_indptr"]) - 1

    @property
    def weight_drop(self) -> list[float] | None:
        """Weight of each tree, for dart and, since XGBoost 3.3, for every model; otherwise None."""
        weights = _weights_place(self.head).get("weight_drop")
        return None if weights is None else [float(weight) for weight in weights]

    def iterations(self, begin: int) -> TreeModel:
        """Return the boosting rounds from `begin` on; the list of tree weights (dart) is not cut."""
        model = self.model
        start = [int(at) for at in model["iteration_indptr"]][begin:]
        cut = {
            **model,
            "tree_info": [int(group) for group in model["tree_info"]][start[0] :],
            "iteration_indptr": [at - start[0] for at in start],
            "gbtree_model_param": model["gbtree_model_param"] | {"num_trees": str(len(self.trees) - start[0])},
        }
        return TreeModel(_with_model(self.head, cut), self.trees[start[0] :])

    def with_head(self, model: dict[str, Any] | None = None, weight_drop: Sequence[float] | None = None) -> TreeModel:
        """Return the model with another `model` part or other tree weights.

        Args:
            model: The new part; None keeps the present one.
            weight_drop: The new weights; None keeps the present ones.

        Returns:
            A model that shares the trees with this one.
        """
        head = _with_model(self.head, dict(model or self.model))
        if weight_drop is not None:
            _weights_place(head)["weight_drop"] = [np.float32(weight) for weight in weight_drop]
        return TreeModel(head, self.trees)


def booster_model(document: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model document with the trees, for gbtree and dart."""
    booster = document["learner"]["gradient_booster"]
    model: dict[str, Any] = booster["gbtree"]["model"] if "gbtree" in booster else booster["model"]
    return model


def base_score(head: dict[str, Any]) -> list[float]:
    """Return the base score: one number, or one per class (XGBoost 3.1 and later)."""
    text = str(head["learner"]["learner_model_param"]["base_score"])
    return [float(part) for part in text.strip("[]").split(",")]


def pooled_base_score(head: dict[str, Any], sums: Array, weight: float) -> list[float]:
    """Compute the base score of rows at several sites from sums over their rows.

    For objectives "multi:...", it is log p_k - mean(log p) for the classes' shares p, at least 1e-6, as in XGBoost 3.1
    and later. For others it is the mean of the labels, one per target.

    Args:
        head: Head of a model with the objective.
        sums: Sums of the weights of each class's rows, or of weight times label for each target, float64.
        weight: Sum of the weights of all rows, above 0.

    Returns:
        A number per class or target.
    """
    means = np.asarray(sums, np.float64) / weight
    if not str(head["learner"]["objective"]["name"]).startswith("multi:"):
        return [float(mean) for mean in means]
    logs = np.log(np.maximum(means, _LEAST_SHARE))
    return [float(score) for score in logs - logs.mean()]


def with_base_score(head: dict[str, Any], scores: Iterable[float]) -> dict[str, Any]:
    """Return a head with a given base score, which XGBoost then does not estimate again."""
    learner = head["learner"]
    before = str(learner["learner_model_param"]["base_score"])
    text = ",".join(str(np.float32(score)) for score in scores)
    text = f"[{text}]" if before.startswith("[") else text
    params = learner["learner_model_param"] | {"base_score": text, "boost_from_average": "0"}
    return {**head, "learner": {**learner, "learner_model_param": params}}


def scaled(tree: dict[str, Any], share: float) -> dict[str, Any]:
    """Scale the leaves of a tree.

    Args:
        tree: The tree; not changed.
        share: The factor. Products are computed in float64 and rounded to float32 once.

    Returns:
        The scaled tree, or `tree` itself for a factor of 1.
    """
    if share == 1.0:
        return tree
    leaves = np.asarray(tree["left_children"]) == -1
    values = np.asarray(tree["split_conditions"], np.float32).copy()
    values[leaves] = (values[leaves].astype(np.float64) * share).astype(np.float32)
    weights = (np.asarray(tree["base_weights"], np.float32).astype(np.float64) * share).astype(np.float32)
    return {**tree, "split_conditions": values, "base_weights": weights}


def masked(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree without facts about the data beyond its splits and leaves: numbers of rows, and gains."""
    leaves = np.asarray(tree["left_children"]) == -1
    weights = np.where(leaves, np.asarray(tree["base_weights"], np.float32), np.float32(0))
    empty = np.zeros(len(leaves), np.float32)
    return {**tree, "base_weights": weights, "loss_changes": empty, "sum_hessian": empty}


def _weights_place(head: dict[str, Any]) -> dict[str, Any]:
    """Return the object that holds the tree weights: since XGBoost 3.4 the model, before that the booster."""
    model, booster = booster_model(head), head["learner"]["gradient_booster"]
    return model if "weight_drop" in model else booster


def _with_model(head: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    learner, booster = head["learner"], head["learner"]["gradient_booster"]
    if "gbtree" in booster:
        booster = {**booster, "gbtree": {**booster["gbtree"], "model": model}}
    else:
        booster = {**booster, "model": model}
    return {**head, "learner": {**learner, "gradient_booster": booster}}


def _padded(array: Array) -> Array:
    """Pad an array with zeros, by up to an eighth of its length, so that few different lengths occur."""
    step = max(64, 1 << max(len(array).bit_length() - 3, 0))
    return np.concatenate([array, np.zeros(-len(array) % step, array.dtype)])


_INTS = ("left_children", "right_children", "parents", "split_indices", "categories", "categories_nodes")
_KINDS: dict[str, Any] = dict.fromkeys(_INTS, np.int32) | dict.fromkeys(
    ("categories_segments", "categories_sizes"), np.int64
)
_KINDS |= dict.fromkeys(("split_conditions", "base_weights", "loss_changes", "sum_hessian"), np.float32)
_KINDS |= dict.fromkeys(("default_left", "split_type"), np.uint8)


def _parsed(data: bytes | bytearray) -> Any:
    return parse_json(bytes(data), limit_chars=_MAX_CHARS, depth=_MAX_DEPTH)


def _typed(document: Any) -> Any:
    """Give the trees' arrays in a parsed JSON document the dtypes that UBJSON has."""
    model = booster_model(document)
    model["trees"] = [
        {name: np.array(value, _KINDS[name]) if name in _KINDS else value for name, value in tree.items()}
        for tree in model["trees"]
    ]
    return document
