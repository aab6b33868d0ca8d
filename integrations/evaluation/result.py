"""The result of `evaluate`: a document that is the same at every site."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError

FILE = "evaluation.json"
"""Name of the file that an evaluation leaves in the folder of its run."""
FORMAT = 1
_FIRST = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "macro_f1",
    "roc_auc",
    "log_loss",
    "brier",
    "ece",
)


@dataclass(frozen=True)
class Absence:
    """A site of the job that is not in the scores.

    Attributes:
        site: Name of the site.
        reason: Why, as the end of a sentence.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose probability lies in one bin.

    Attributes:
        low: Lower end of the bin.
        high: Upper end.
        rows: Number of rows.
        mean_score: Mean probability: of the positive class, or of the predicted one if there are more than two.
        share: Share of rows of the positive class, or of rows predicted correctly.
    """

    low: float
    high: float
    rows: int
    mean_score: float
    share: float


@dataclass(frozen=True)
class RocPoint:
    """A point of a ROC curve.

    Attributes:
        threshold: Score from which on rows count as positive.
        false_positive_rate: Share of the negatives that count as positive.
        true_positive_rate: Share of the positives that count as positive.
    """

    threshold: float
    false_positive_rate: float
    true_positive_rate: float


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one set of rows.

    Attributes:
        rows: Number of rows.
        metrics: Name -> value; None where it is not defined, such as the precision of a class that is never predicted.
        errors: Name of a metric -> bound on its difference to the exact value. A metric that is not named is exact up
            to rounding.
        classes: Label -> precision, recall, f1, support and, with scores, roc_auc of this class against all others.
        confusion: Number of rows by true (row) and predicted label (column), in the order of the labels.
        reliability: The bins of the reliability table that hold rows; of all rows and of single sites.
        roc: Points of the ROC curve of two classes, the strictest first; of all rows and of single sites.
    """

    rows: int
    metrics: Mapping[str, float | None]
    errors: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...] = ()
    reliability: tuple[ReliabilityBin, ...] = ()
    roc: tuple[RocPoint, ...] = ()


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model.

    Attributes:
        overall: On the rows of all sites that take part.
        groups: Column -> subgroup -> scores. "(other)" holds the rows of subgroups that are too small at their site.
        per_site: Site -> scores on its rows, of the sites that allow it.
    """

    overall: Scores
    groups: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    per_site: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Scores of models over all sites. It is the same at every site, and prints as tables.

    Attributes:
        task: "classification" or "regression".
        rows: Number of rows of the sites that take part.
        sites: Names of these sites.
        labels: The classes, in order; empty for a regression.
        positive: The positive one of two classes; "" otherwise.
        models: Name -> scores.
        absences: Sites that are not in the scores, and why.
    """

    task: str
    rows: int
    sites: tuple[str, ...]
    labels: tuple[str, ...]
    positive: str
    models: Mapping[str, ModelScores]
    absences: tuple[Absence, ...] = ()

    def to_json(self) -> str:
        """Write the document as JSON.

        Returns:
            The JSON, without NaN or infinity.
        """
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False, indent=1)

    def save(self, path: str | Path) -> Path:
        """Write the document to a file.

        Args:
            path: The file. Its folder is made if it does not exist.

        Returns:
            The file.

        Raises:
            ConfigError: The file cannot be written.
        """
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the evaluation cannot be written: {error.strerror}", where=str(file), fix="name another file"
            ) from None
        return file

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read the file that `save` or a run has left.

        Args:
            path: The file, such as `runs/<job>/evaluation.json`.

        Returns:
            The scores.

        Raises:
            ConfigError: There is no such file, or it holds something else.
        """
        fix = "name the evaluation.json of a run that has ended, of this version of fl-adapters"
        try:
            return _evaluation(json.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            raise ConfigError(f"the file cannot be read: {error.strerror}", where=str(path), fix=fix) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the file holds no evaluation: {error!r}", where=str(path), fix=fix) from None

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _evaluation(fields: dict[str, Any]) -> Evaluation:
    if fields.pop("format") != FORMAT:
        raise ValueError("another format")
    models = {
        name: ModelScores(
            _scores(model["overall"]),
            {column: _each(groups) for column, groups in model["groups"].items()},
            _each(model["per_site"]),
        )
        for name, model in fields.pop("models").items()
    }
    absences = tuple(Absence(**absence) for absence in fields.pop("absences"))
    sites, labels = tuple(fields.pop("sites")), tuple(fields.pop("labels"))
    return Evaluation(**fields, sites=sites, labels=labels, models=models, absences=absences)


def _each(parts: Mapping[str, Any]) -> dict[str, Scores]:
    return {name: _scores(scores) for name, scores in parts.items()}


def _scores(fields: dict[str, Any]) -> Scores:
    lists = {
        "confusion": tuple(tuple(row) for row in fields["confusion"]),
        "reliability": tuple(ReliabilityBin(**part) for part in fields["reliability"]),
        "roc": tuple(RocPoint(**point) for point in fields["roc"]),
    }
    return Scores(**{**fields, **lists})


def _lines(found: Evaluation) -> Iterator[str]:
    yield f"{found.rows} rows of {len(found.sites)} sites: {', '.join(found.sites)}"
    yield from (f"without {absence.site}: {absence.reason}" for absence in found.absences)
    yield ""
    yield from _table("model", {name: model.overall for name, model in found.models.items()})
    for name, model in found.models.items():
        for column, groups in model.groups.items():
            yield from ("", *_table(f"{name}, by {column}", groups))
        if len(model.per_site) > 1:
            yield from ("", *_table(f"{name}, by site", model.per_site))


def _table(title: str, rows: Mapping[str, Scores]) -> Iterator[str]:
    """Yield the lines of a table with a row for each set of rows and a column for each metric that one of them has."""
    known = dict.fromkeys(name for scores in rows.values() for name in scores.metrics)
    names = [name for name in _FIRST if name in known] if set(_FIRST) & set(known) else list(known)
    cells = [[title, "rows", *names]]
    cells += [[row, str(scores.rows), *(_cell(scores, name) for name in names)] for row, scores in rows.items()]
    yield from aligned(cells)


def _cell(scores: Scores, name: str) -> str:
    value = scores.metrics.get(name)
    if value is None:
        return "-"
    error = scores.errors.get(name, 0.0)
    return f"{value:.4f} ±{error:.0e}" if error > 5e-5 else f"{value:.4f}"


def aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        first, *rest = (
            text.ljust(w) if not n else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()
