"""Scores of classes: what each site counts, and the metrics of the totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.federation import Federation

from .agreement import Segments, SiteCard, agree_on_groups
from .cells import pooled_groups
from .inputs import Codes, Numbers, Prediction, Question, Rows
from .ranking import Area, Curve, Grid, area, cells_for, common_grids, counted, points
from .result import ReliabilityBin, RocPoint, Scores

_MOST_CURVES = 20  # of one model: beyond that many classes there is no area under the curve of each


@dataclass(frozen=True)
class Classes:
    """The agreed classes.

    Attributes:
        labels: All labels, in order.
        positive: Number of the positive one of two classes.
    """

    labels: tuple[str, ...]
    positive: int

    @classmethod
    def of(cls, labels: Sequence[str], question: Question) -> Classes:
        """Return the classes; the last label is positive unless the question names another."""
        chosen = len(labels) - 1 if question.positive is None else list(labels).index(question.positive)
        return cls(tuple(labels), chosen)

    @property
    def binary(self) -> bool:
        """Whether there are two classes."""
        return len(self.labels) == 2

    def codes(self, texts: npt.NDArray[np.object_]) -> Codes:
        """Return the number of each row's label."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        return np.array([numbers[text] for text in texts.tolist()], np.int64)


class ClassModel:
    """One model at this site.

    Args:
        prediction: What it predicts.
        truth: Number of the true class of each row.
        classes: The agreed classes.
        question: What is asked.
    """

    def __init__(self, prediction: Prediction, truth: Codes, classes: Classes, question: Question) -> None:
        self._prediction = _of_two(prediction, classes, question) if classes.binary else prediction
        self._truth, self._classes, self._question = truth, classes, question
        values = self._prediction.values
        if self._prediction.kind == "labels":
            self.predicted = classes.codes(values)
        elif self._prediction.kind == "score":
            self.predicted = np.where(values >= question.threshold, classes.positive, 1 - classes.positive)
        else:
            self.predicted = values.argmax(axis=1).astype(np.int64)

    @property
    def probabilistic(self) -> bool:
        """Whether the model gives probabilities."""
        return self._prediction.kind != "labels" and self._question.scores == "probability"

    def confusion(self, rows: Codes) -> Numbers:
        """Return the number of some rows by true and predicted class, flat."""
        size = len(self._classes.labels)
        return np.bincount(self._truth[rows] * size + self.predicted[rows], minlength=size**2).astype(np.float64)

    def curves(self) -> list[Curve]:
        """Return a curve for two classes, or one for each class against all others."""
        values = self._prediction.values
        if self._prediction.kind == "score":
            return [Curve(values, self._truth == self._classes.positive)]
        if self._prediction.kind == "scores" and len(self._classes.labels) <= _MOST_CURVES:
            return [Curve(values[:, number], self._truth == number) for number in range(len(self._classes.labels))]
        return []

    def losses(self, rows: Codes) -> Numbers:
        """Return sums over some rows: log loss, Brier score, and probability of the positive class."""
        if not self.probabilistic:
            return np.zeros(3)
        values, eps, truth = self._prediction.values[rows], self._prediction.eps, self._truth[rows]
        if self._prediction.kind == "score":
            hits = truth == self._classes.positive
            kept = np.clip(values, eps, 1 - eps)
            loss = -np.where(hits, np.log(kept), np.log1p(-kept)).sum()
            return np.array([loss, ((values - hits) ** 2).sum(), values.sum()])
        own = np.clip(values, eps, 1 - eps)[np.arange(len(rows)), truth]
        hits = truth[:, None] == np.arange(values.shape[1])
        return np.array([-np.log(own).sum(), ((values - hits) ** 2).sum(), 0.0])

    def reliability(self, rows: Codes, least: int) -> Numbers:
        """Return sums over some rows by bin: rows, probability, positive or correct rows [3, bins].

        Bins with fewer rows than `least` are left out together.
        """
        bins = self._question.bins
        if not self.probabilistic:
            return np.zeros((3, bins))
        values, truth = self._prediction.values[rows], self._truth[rows]
        if self._prediction.kind == "score":
            score, hits = values, truth == self._classes.positive
        else:
            score, hits = values.max(axis=1, initial=0.0), truth == self.predicted[rows]
        place = np.minimum((score * bins).astype(np.int64), bins - 1)
        sums = np.array(
            [np.bincount(place, weights, bins) for weights in (np.ones(len(rows)), score, hits)], np.float64
        )
        return sums * ~pooled_groups(sums[:1].T, least)


def score_classes(
    federation: Federation, rows: Rows, question: Question, labels: Sequence[str], cards: list[SiteCard], least: int
) -> tuple[Segments, dict[str, list[Scores]]]:
    """Score models that predict classes.

    Args:
        federation: The federation.
        rows: This site's rows; none if it stays out.
        question: What is asked.
        labels: The agreed labels.
        cards: The cards of all sites.
        least: This site's smallest cell.

    Returns:
        The segments, and for each model its scores on each of them.
    """
    classes = Classes.of(labels, question)
    truth = classes.codes(rows.truth)
    models = {name: ClassModel(p, truth, classes, question) for name, p in rows.predictions.items()}
    cells = {column: _cells(texts, list(models.values())) for column, texts in rows.groups.items()}
    segments, pooled = agree_on_groups(federation, cells, cards, least)
    own = segments.own_rows(rows, pooled, federation.site.name)
    curves = [(name, curve) for name, model in models.items() for curve in model.curves()]
    size = cells_for(len(curves), len(segments))
    grids = common_grids(federation, [curve for _, curve in curves], question.scores, size, least)
    whole = [0, *range(1 + len(segments.groups), len(segments))]
    sums: dict[str, Numbers] = {}
    for number, model in enumerate(models.values()):
        sums[f"{number} confusion"] = np.array([model.confusion(part) for part in own])
        sums[f"{number} losses"] = np.array([model.losses(part) for part in own])
        sums[f"{number} reliability"] = np.array([model.reliability(own[at], least) for at in whole])
    for number, (grid, (_, curve)) in enumerate(zip(grids, curves, strict=True)):
        sums[f"{number} ranking"] = counted(grid, curve, own, least)
    totals = federation.sum(sums)
    found: dict[str, list[Scores]] = {}
    for number, (name, model) in enumerate(models.items()):
        mine = [(grids[at], totals[f"{at} ranking"]) for at, (owner, _) in enumerate(curves) if owner == name]
        parts = [totals[f"{number} {kind}"] for kind in ("confusion", "losses", "reliability")]
        found[name] = [
            _scores(classes, model.probabilistic, [part[at] for part in parts[:2]], mine, at) for at in range(len(own))
        ]
        for place, at in enumerate(whole):
            found[name][at] = _with_curves(
                found[name][at], parts[2][place], mine, at, probabilistic=model.probabilistic
            )
    return segments, found


def _of_two(prediction: Prediction, classes: Classes, question: Question) -> Prediction:
    """Return the scores of the positive one of two classes in place of those of both."""
    if prediction.kind != "scores":
        return prediction
    values = prediction.values
    own = values[:, classes.positive]
    return replace(
        prediction,
        kind="score",
        values=own if question.scores == "probability" else own - values[:, 1 - classes.positive],
    )


def _cells(texts: npt.NDArray[np.object_], models: Sequence[ClassModel]) -> tuple[list[str], Numbers]:
    """Return the subgroups of a column, and the cells of all confusion matrices of each."""
    values = sorted(set(texts.tolist()))
    parts = [np.concatenate([m.confusion(np.flatnonzero(texts == value)) for m in models]) for value in values]
    return values, np.array(parts)


def _scores(
    classes: Classes, probabilistic: bool, parts: Sequence[Numbers], curves: Sequence[tuple[Grid, Numbers]], at: int
) -> Scores:
    """The scores of one segment, without what only whole sites have."""
    flat, losses = parts
    size, rows = len(classes.labels), float(flat.sum())
    confusion = flat.reshape(size, size)
    areas = [area(counts[:, at], grid.tied) for grid, counts in curves]
    by_class = _by_class(classes, confusion, areas)
    metrics: dict[str, float | None] = {"accuracy": _share(np.trace(confusion), rows)}
    present = [by_class[label]["recall"] for label in classes.labels if by_class[label]["support"]]
    metrics["balanced_accuracy"] = _mean(present)
    if classes.binary:
        positive = by_class[classes.labels[classes.positive]]
        metrics |= {name: positive[name] for name in ("precision", "recall", "f1")}
        metrics["specificity"] = by_class[classes.labels[1 - classes.positive]]["recall"]
        metrics["prevalence"] = _share(positive["support"] or 0.0, rows)
    else:
        for name in ("precision", "recall", "f1"):
            metrics[f"macro_{name}"] = _mean([values[name] or 0.0 for values in by_class.values()])
        weighted = sum((values["f1"] or 0.0) * (values["support"] or 0.0) for values in by_class.values())
        metrics["weighted_f1"] = _share(weighted, rows)
    metrics["matthews"] = _matthews(confusion)
    errors: dict[str, float] = {}
    known = [found for found in areas if found is not None]
    if areas:
        metrics["roc_auc"] = _mean([found.value for found in known]) if len(known) == len(areas) else None
    if known and len(known) == len(areas) and (error := sum(found.error for found in known) / len(known)):
        errors["roc_auc"] = error
    if probabilistic:
        metrics["log_loss"], metrics["brier"] = _share(losses[0], rows), _share(losses[1], rows)
        if classes.binary:
            metrics["mean_score"] = _share(losses[2], rows)
    matrix = tuple(tuple(int(count) for count in row) for row in confusion)
    return Scores(int(rows), metrics, errors, by_class, matrix)


def _by_class(classes: Classes, confusion: Numbers, areas: Sequence[Area | None]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for number, label in enumerate(classes.labels):
        hits, support, predicted = confusion[number, number], confusion[number].sum(), confusion[:, number].sum()
        found[label] = {
            "precision": _share(hits, predicted),
            "recall": _share(hits, support),
            "f1": _share(2 * hits, support + predicted),
            "support": float(support),
        }
        if len(areas) == len(classes.labels):
            one = areas[number]
            found[label]["roc_auc"] = None if one is None else one.value
    return found


def _with_curves(
    scores: Scores, sums: Numbers, curves: Sequence[tuple[Grid, Numbers]], at: int, *, probabilistic: bool
) -> Scores:
    """Add the reliability table, the calibration error, and the points of the ROC curve."""
    roc: tuple[RocPoint, ...] = ()
    if len(curves) == 1:
        grid, counts = curves[0]
        roc = tuple(RocPoint(*point) for point in points(counts[:, at], grid.edges))
    if not probabilistic or not scores.rows:
        return replace(scores, roc=roc)
    bins = sums.shape[1]
    table = tuple(
        ReliabilityBin(b / bins, (b + 1) / bins, int(n), float(score / n), float(hits / n))
        for b, (n, score, hits) in enumerate(sums.T)
        if n
    )
    told = float(sums[0].sum())
    errors = dict(scores.errors)
    if told < scores.rows:
        errors["ece"] = 1 - told / scores.rows
    ece = float(np.abs(sums[1] - sums[2]).sum()) / scores.rows if told else None
    return replace(scores, metrics={**scores.metrics, "ece": ece}, errors=errors, reliability=table, roc=roc)


def _matthews(confusion: Numbers) -> float | None:
    rows, true, predicted = confusion.sum(), confusion.sum(axis=1), confusion.sum(axis=0)
    spread = (rows**2 - (predicted**2).sum()) * (rows**2 - (true**2).sum())
    return float((np.trace(confusion) * rows - true @ predicted) / math.sqrt(spread)) if spread > 0 else None


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
