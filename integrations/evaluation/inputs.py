"""What a site brings to an evaluation: true values, predictions and subgroups, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fl_runtime.errors import ConfigError

Numbers = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
TaskName = Literal["classification", "regression"]
ScoreKind = Literal["probability", "decision"]
PredictionKind = Literal["values", "labels", "score", "scores"]

OTHER, MISSING = "(other)", "(missing)"
MOST_LABELS, MOST_GROUPS, MOST_MODELS, MOST_COLUMNS = 200, 200, 50, 50
_NAME_CHARS = 200
_WHERE = "evaluate"


@dataclass(frozen=True)
class Question:
    """What all sites must agree on.

    Attributes:
        task: Whether the true values are classes or numbers.
        scores: Whether scores are probabilities, or numbers of any size that grow with them.
        labels: The classes in the order of the columns of scores; None for the sorted labels of all sites.
        positive: The positive one of two classes; None for the last label.
        threshold: A score from which on the positive class is predicted.
        bins: Number of bins of the reliability table.
    """

    task: TaskName
    scores: ScoreKind
    labels: tuple[str, ...] | None
    positive: str | None
    threshold: float
    bins: int

    def facts(self) -> dict[str, str]:
        """Return the question as texts that can be compared between sites."""
        return {
            "task": self.task,
            "scores": self.scores,
            "labels": "not given" if self.labels is None else ", ".join(self.labels),
            "positive": "not given" if self.positive is None else self.positive,
            "threshold": repr(self.threshold),
            "bins": str(self.bins),
        }


@dataclass(frozen=True)
class Prediction:
    """What one model predicts for each row.

    Attributes:
        kind: "values" of a regression, predicted "labels", a "score" of the positive class, or "scores" of all classes.
        values: Numbers [rows] or [rows, classes], or texts [rows].
        eps: Probabilities are kept this far from 0 and 1 in the log loss, as scikit-learn does for their dtype.
    """

    kind: PredictionKind
    values: npt.NDArray[Any]
    eps: float = 0.0

    @property
    def width(self) -> int:
        """Number of columns of scores; 1 for anything else."""
        return int(self.values.shape[1]) if self.kind == "scores" else 1


@dataclass(frozen=True)
class Rows:
    """The rows of a site.

    Attributes:
        truth: Numbers of a regression, or texts.
        predictions: Name of the model -> its prediction.
        groups: Name of the column -> a text for each row.
    """

    truth: npt.NDArray[Any]
    predictions: Mapping[str, Prediction]
    groups: Mapping[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.truth)

    def facts(self) -> dict[str, str]:
        """Return what sites must have alike, as texts that can be compared."""
        kinds = {f"prediction of {name}": f"{p.kind} {p.width}" for name, p in self.predictions.items()}
        return {"models": ", ".join(self.predictions), "groups": ", ".join(self.groups), **kinds}


def make_question(
    task: str, scores: str, labels: Sequence[Any] | None, positive: Any, threshold: float | None, bins: int
) -> Question:
    """Check the arguments of an evaluation that hold no data. Raises ConfigError for one that cannot work."""
    for name, value, known in (
        ("task", task, ("classification", "regression")),
        ("scores", scores, ("probability", "decision")),
    ):
        if value not in known:
            raise ConfigError(
                f"{name}={value!r} is not known", where=_WHERE, fix=f"choose {known[0]!r} or {known[1]!r}"
            )
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= 1000:
        raise ConfigError(f"bins={bins!r} is no number of bins", where=_WHERE, fix="give a whole number from 1 to 1000")
    cut = (0.5 if scores == "probability" else 0.0) if threshold is None else float(threshold)
    if not math.isfinite(cut):
        raise ConfigError(f"threshold={threshold!r} is not finite", where=_WHERE, fix="give a number")
    texts = None if labels is None else tuple(label_text(label) for label in labels)
    if texts is not None and (len(set(texts)) != len(texts) or not 2 <= len(texts) <= MOST_LABELS):
        raise ConfigError(
            f"labels={labels!r} are not between 2 and {MOST_LABELS} different labels",
            where=_WHERE,
            fix="name each once",
        )
    chosen = None if positive is None else label_text(positive)
    return Question(task, scores, texts, chosen, cut, bins)  # type: ignore[arg-type]


def read_rows(truth: Any, predictions: Any, groups: Mapping[str, Any] | None, question: Question) -> Rows:
    """Check a site's rows.

    Args:
        truth: True values, one for each row.
        predictions: Predictions of one model, or name -> predictions of each.
        groups: Name of a column -> subgroup of each row.
        question: What is asked.

    Returns:
        The rows.

    Raises:
        ConfigError: They cannot be evaluated.
    """
    regression = question.task == "regression"
    values = _numbers("truth", truth) if regression else _texts("truth", truth, allow_missing=False)
    given = predictions if isinstance(predictions, Mapping) else {"model": predictions}
    _check_names("a model", given, 1, MOST_MODELS)
    columns = groups or {}
    _check_names("a column of groups", columns, 0, MOST_COLUMNS)
    read = {str(name): _prediction(str(name), value, question) for name, value in given.items()}
    texts = {str(name): _texts(name, value, allow_missing=True) for name, value in columns.items()}
    lengths = [(name, len(p.values)) for name, p in read.items()] + [(name, len(c)) for name, c in texts.items()]
    for name, length in lengths:
        if length != len(values):
            raise ConfigError(
                f"{name!r} has {length} rows and the truth {len(values)}", where=_WHERE, fix="pass one for each row"
            )
    for name, prediction in read.items():
        if prediction.kind == "labels":
            _check_labels(name, set(prediction.values.tolist()), set(values.tolist()))
    return Rows(values, read, texts)


def label_text(value: Any) -> str:
    """Return a label as the text that it has at every site: 1, 1.0 and True are the same."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    text = str(value)
    if not isinstance(value, str | int | float) or not 0 < len(text) <= _NAME_CHARS or not text.isprintable():
        raise ConfigError(
            f"{text[:60]!r} is no label",
            where=_WHERE,
            fix=f"use numbers, or printable texts of {_NAME_CHARS} characters",
        )
    return text


def _check_labels(name: str, predicted: set[str], true: set[str]) -> None:
    """Raise ConfigError if a model predicts several labels, and none of the several that this site has."""
    if min(len(predicted), len(true)) > 1 and not predicted & true:
        shown = (", ".join(sorted(labels)[:5]) for labels in (predicted, true))
        raise ConfigError(
            "the model {!r} predicts {}, and the truth is {}".format(name, *shown),
            where=_WHERE,
            fix="name the labels alike in both, or pass scores as floats",
        )


def _check_names(what: str, names: Mapping[Any, Any], least: int, most: int) -> None:
    if not least <= len(names) <= most:
        raise ConfigError(f"there are {len(names)} of {what}", where=_WHERE, fix=f"pass from {least} to {most}")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= _NAME_CHARS or not name.isprintable() or "," in name:
            raise ConfigError(f"{name!r} is no name of {what}", where=_WHERE, fix="use a printable text without commas")


def _prediction(name: str, value: Any, question: Question) -> Prediction:
    array = _array(name, value)
    if question.task == "regression":
        return Prediction("values", _numbers(name, array))
    if array.dtype.kind != "f":
        return Prediction("labels", _texts(name, array, allow_missing=False))
    numbers = _numbers(name, array, dimensions=(1, 2))
    probabilities = question.scores == "probability"
    if probabilities and numbers.size and (numbers.min() < 0 or numbers.max() > 1):
        raise ConfigError(
            f"the scores of {name!r} go from {numbers.min():.4g} to {numbers.max():.4g}, which are no probabilities",
            where=_WHERE,
            fix='pass scores="decision", or predicted labels as integers or texts',
        )
    eps = float(np.finfo(array.dtype).eps)
    if numbers.ndim == 1:
        return Prediction("score", numbers, eps)
    if probabilities and len(numbers) and np.abs(numbers.sum(axis=1) - 1).max() > 1e-3:
        raise ConfigError(
            f"the probabilities of {name!r} do not add up to 1 in every row", where=_WHERE, fix='pass scores="decision"'
        )
    return Prediction("scores", numbers, eps)


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name!r} is a {type(value).__name__} that NumPy cannot read: {error}", where=_WHERE, fix="pass an array"
        ) from None


def _numbers(name: str, value: Any, dimensions: tuple[int, ...] = (1,)) -> Numbers:
    array = _array(name, value)
    if array.ndim not in dimensions or array.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name!r} has the shape {array.shape} and the dtype {array.dtype}", where=_WHERE, fix="pass real numbers"
        )
    numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ConfigError(
            f"{name!r} holds {int((~np.isfinite(numbers)).sum())} values that are not finite",
            where=_WHERE,
            fix="leave these rows out of everything",
        )
    return numbers


def _texts(name: str, value: Any, *, allow_missing: bool) -> npt.NDArray[Any]:
    array = _array(name, value)
    if array.ndim != 1:
        raise ConfigError(f"{name!r} has the shape {array.shape}", where=_WHERE, fix="pass one value for each row")
    known: dict[Any, str] = {}
    texts = np.empty(len(array), object)
    for row, entry in enumerate(array.tolist()):
        missing = entry is None or entry != entry
        if missing and not allow_missing:
            raise ConfigError(f"{name!r} has no value in row {row}", where=_WHERE, fix="leave this row out")
        if missing:
            texts[row] = MISSING
            continue
        if entry not in known:
            known[entry] = label_text(entry)
        texts[row] = known[entry]
    most = MOST_GROUPS if allow_missing else MOST_LABELS
    if len(set(known.values())) > most:
        fix = "put values together, such as ages into bands" if allow_missing else 'pass task="regression" for numbers'
        raise ConfigError(f"{name!r} has more than {most} different values", where=_WHERE, fix=fix)
    return texts
