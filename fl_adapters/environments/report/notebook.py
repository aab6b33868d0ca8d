"""Results as notebooks show them: a table of pandas, a figure of matplotlib, and the report as a cell's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fl_adapters.environments.models import Which, load_model
from fl_adapters.environments.report.document import tag
from fl_adapters.environments.report.heatmap import plain
from fl_adapters.environments.report.page import run_page
from fl_adapters.environments.report.record import read_run, read_trainings
from fl_runtime.errors import ConfigError
from fl_runtime.trainings import EVENTS, HISTORY

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_PANELS = 4
_ACROSS = 2


class NotebookView:
    """What a notebook shows of a result whose files lie in a folder.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def history(self) -> pandas.DataFrame:
        """The rows of history.csv: one for each round and site, and one for each round with the site "global".

        Raises:
            ConfigError: pandas is not installed, or the run's folder is gone.
        """
        return history_frame(self.folder)

    def plot(self, metrics: Sequence[str] = ()) -> Figure:
        """Draw metrics by round: each site, and all sites together.

        Args:
            metrics: Names of the metrics; default the four that matter most, that of the best round first.

        Returns:
            A figure of matplotlib with a panel for each metric, which a notebook shows.

        Raises:
            ConfigError: matplotlib is not installed, the run's folder is gone, or it has no such metric.
        """
        return figure_of(self.folder, metrics)

    def load(self, into: Any = None, *, which: Which = "final", partial: bool = False) -> Any:
        """Open the global model with the call of the framework that trained it. Nothing is unpickled.

        Args:
            into: What to load into, where the files alone do not make a model: your class of a Lightning module or of
                transformers; a module of PyTorch, which is changed in place; the base of a PEFT adapter; a built model
                of Keras; a Booster or an estimator of XGBoost. Default: what the files make.
            which: "final" for the last global model, "best" for that of the best round.
            partial: Whether `into` keeps its own values for tensors that did not travel. Otherwise those are an error.

        Returns:
            The model, on the CPU. Without `into`: of transformers, PEFT, sentence-transformers, Keras or XGBoost as
            they open it themselves; the state dict of another PyTorch module; else name -> NumPy array.

        Raises:
            ConfigError: There is no such model, or it cannot be opened in this way. The error says what to do.
            StateMismatchError: The model does not fit `into`, which is as it was.
            ImportError: The framework is not installed.
        """
        return load_model(self.folder, into, which=which, partial=partial)

    def _repr_html_(self) -> str | None:
        """The report, which a notebook shows where a cell ends with a result; None without the run's folder."""
        return cell_html(self.folder) if (self.folder / EVENTS).is_file() else None


def history_frame(folder: Path) -> pandas.DataFrame:
    """Read the history of a training.

    Args:
        folder: Its folder.

    Returns:
        A row for each round and site, and one for each round with the site "global"; the columns of history.csv.

    Raises:
        ConfigError: pandas is not installed, or there is no history.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError(
            "a history as a table needs pandas", where="history", fix="pip install pandas, or read result.rounds"
        ) from None
    path = folder / HISTORY
    if not path.is_file():
        raise ConfigError("there is no history", where=str(path), fix="check that the run's folder is still there")
    return pandas.read_csv(path)


def figure_of(folder: Path, metrics: Sequence[str] = ()) -> Figure:
    """Draw the metrics of a training by round: each site, and all sites together.

    Args:
        folder: Its folder.
        metrics: Names of the metrics; default the four that matter most, that of the best round first.

    Returns:
        A figure of matplotlib, with a panel for each metric.

    Raises:
        ConfigError: matplotlib is not installed, there is no run in the folder, or it has no such metric.
    """
    run = read_run(folder)
    known = run.metrics
    chosen = list(metrics) or known[:_PANELS]
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        raise ConfigError(
            f"the run has no metric {missing[0]!r}" if missing else "the run has no metrics",
            where="metrics",
            fix=f"choose from: {', '.join(known)}" if known else "report metrics in the script",
        )
    try:
        from matplotlib.ticker import MaxNLocator

        from fl_adapters.environments.report.figure import NotebookFigure
    except ImportError:
        raise ConfigError(
            "a plot needs matplotlib", where="plot", fix="pip install matplotlib, or open report.html"
        ) from None
    across = min(_ACROSS, len(chosen))
    down = math.ceil(len(chosen) / across)
    figure = NotebookFigure(figsize=(5.0 * across, 3.2 * down), layout="constrained")
    for at, metric in enumerate(chosen, 1):
        axes = figure.add_subplot(down, across, at, title=plain(metric), xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves = run.site_curves(metric)
        for site in run.sites:
            axes.plot(*_columns(curves.get(site, [])), linewidth=1, label=plain(site))
        axes.plot(*_columns(run.curve(metric)), color="black", linewidth=2.2, label="all sites")
        if at == 1 and len(run.sites) <= 2 * _PANELS:
            axes.legend(fontsize="small")
    return figure


def cell_html(folder: Path) -> str:
    """Return the report of a training as the output of a notebook's cell.

    Args:
        folder: Its folder.

    Returns:
        A frame of its own, so that the page's style stays apart from the notebook's. Scripts cannot run in it.

    Raises:
        ConfigError: There is no run in the folder.
    """
    trainings = read_trainings(folder)
    style = "width: 100%; height: 40rem; border: 0"
    frame = tag("iframe", srcdoc=run_page(trainings[0], trainings), sandbox="", style=style, title="Report of the run")
    return ElementTree.tostring(frame, encoding="unicode", method="html")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
