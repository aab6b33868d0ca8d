"""Picture of the cross-site evaluation matrix. Drawn only if matplotlib, an optional package, is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fl_runtime.text import printable

_LABEL_CHARS = 60


def draw(folder: Path) -> Path | None:
    """Draw `cross_site.json` as `cross_site.png`: a panel per metric, a row per model, a column per site's data.

    Args:
        folder: Folder of the run. The picture is written beside the JSON file.

    Returns:
        Path of the picture, or None without a `cross_site.json` or without matplotlib.
    """
    source = folder / "cross_site.json"
    if not source.exists():  # checked first: most runs have none and should not wait for the import of matplotlib
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matrix: dict[str, dict[str, dict[str, float]]] = json.loads(source.read_text(encoding="utf-8"))
    models, sites = list(matrix), list(dict.fromkeys(site for row in matrix.values() for site in row))
    metrics = list(dict.fromkeys(name for row in matrix.values() for cell in row.values() for name in cell))
    if not metrics:
        return None
    size = 1.5 + 0.6 * len(sites), 1.2 + 0.45 * len(models)
    figure = Figure(figsize=(size[0] * len(metrics), size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        values = [[matrix[model].get(site, {}).get(metric) for site in sites] for model in models]
        _panel(axes, metric, values, models, sites)
    target = folder / "cross_site.png"
    figure.savefig(target, dpi=120)
    return target


def plain(text: str) -> str:
    """Return a text that matplotlib draws as it is: a name with two dollar signs is no formula.

    Args:
        text: Name of a site or a metric.
    """
    return printable(text, _LABEL_CHARS).replace("$", r"\$")


def _panel(axes: Any, metric: str, values: list[list[float | None]], models: list[str], sites: list[str]) -> None:
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    axes.imshow(numbers, cmap="cividis", aspect="auto")
    axes.set_title(plain(metric))
    axes.set_xticks(range(len(sites)), [plain(site) for site in sites], rotation=45, ha="right")
    axes.set_yticks(range(len(models)), [plain(model) for model in models])
    axes.set_xlabel("data of")
    axes.set_ylabel("model of")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", color="white", fontsize=8)
