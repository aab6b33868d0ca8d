"""Scores of numbers: what each site sums, and the metrics of the totals."""

from __future__ import annotations

import math

import numpy as np

from fl_adapters.loop.federation import Federation

from .agreement import Segments, SiteCard, agree_on_groups
from .inputs import Numbers, Rows
from .result import Scores


def score_numbers(
    federation: Federation, rows: Rows, cards: list[SiteCard], least: int
) -> tuple[Segments, dict[str, list[Scores]]]:
    """Score models that predict numbers.

    Args:
        federation: The federation.
        rows: This site's rows; none if it stays out.
        cards: The cards of all sites.
        least: This site's smallest cell.

    Returns:
        The segments, and for each model its scores on each of them.
    """
    cells: dict[str, tuple[list[str], Numbers]] = {}
    for column, texts in rows.groups.items():
        values, counts = np.unique(texts.astype(str), return_counts=True)
        cells[column] = [str(value) for value in values], counts[:, None].astype(np.float64)
    segments, pooled = agree_on_groups(federation, cells, cards, least)
    own = segments.own_rows(rows, pooled, federation.site.name)
    first = federation.sum({"rows": np.array([len(rows)], np.float64), "total": np.array([rows.truth.sum()])})
    away = rows.truth.astype(np.float64) - first["total"][0] / first["rows"][0]  # so that no digits are lost
    truth = np.array([[len(part), away[part].sum(), (away[part] ** 2).sum()] for part in own])
    sums = {"truth": truth}
    for number, prediction in enumerate(rows.predictions.values()):
        error = prediction.values - rows.truth.astype(np.float64)
        sums[f"{number} error"] = np.array(
            [[error[part].sum(), np.abs(error[part]).sum(), (error[part] ** 2).sum()] for part in own]
        )
    totals = federation.sum(sums)
    found = {
        name: [_scores(totals["truth"][at], totals[f"{number} error"][at]) for at in range(len(own))]
        for number, name in enumerate(rows.predictions)
    }
    return segments, found


def _scores(truth: Numbers, error: Numbers) -> Scores:
    rows, total, square = (float(value) for value in truth)
    if not rows:
        return Scores(0, dict.fromkeys(("mae", "rmse", "mse", "r2", "mean_error"), None))
    spread, mse = square - total**2 / rows, float(error[2]) / rows
    r2 = 1 - float(error[2]) / spread if rows > 1 and spread > 1e-12 * square else None
    mean = {"mae": float(error[1]) / rows, "rmse": math.sqrt(mse), "mse": mse}
    return Scores(int(rows), {**mean, "r2": r2, "mean_error": float(error[0]) / rows})
