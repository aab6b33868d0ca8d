"""Progress of a run: a view that events keep up to date, its screen for terminals and notebooks, and plain lines."""

from fl_adapters.environments.progress.lines import LineWriter, ProgressLines
from fl_adapters.environments.progress.text import (
    counted,
    metrics_text,
    ordered_metrics,
    size_text,
    training_text,
    waiting_text,
)
from fl_adapters.environments.progress.view import RunView, SiteView

__all__ = [
    "LineWriter",
    "ProgressLines",
    "RunView",
    "SiteView",
    "counted",
    "metrics_text",
    "ordered_metrics",
    "size_text",
    "training_text",
    "waiting_text",
]
