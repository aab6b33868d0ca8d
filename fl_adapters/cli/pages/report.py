"""Commands `fl-adapters report` and `compare`: pages about runs, from the files that they have left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.environments.report import write_comparison, write_report
from fl_adapters.environments.report.comparison import Summary, different_settings, metrics_of


def report(folder: Path, out: Path | None, as_json: bool) -> int:
    """Write the report of a run. Returns exit status 0."""
    with report_errors(as_json):
        written = write_report(folder, out)
        console_for(as_json).print(f"report   {written}", highlight=False, soft_wrap=True)
        if as_json:
            show_json({"report": str(written)})
    return 0


def compare(folders: Sequence[Path], out: Path, as_json: bool) -> int:
    """Compare runs: a table on the screen, and a page with their curves. Returns exit status 0."""
    from fl_adapters.cli.pages.comparison_table import comparison_tables

    with report_errors(as_json):
        written, runs = write_comparison(folders, out)
        differences = different_settings(runs)
        console = console_for(as_json)
        columns = dict(differences)
        for metric in [name for name in metrics_of(runs) if any(name in run.best for run in runs)]:
            columns[metric] = [f"{run.best[metric]:.4g}" if metric in run.best else "" for run in runs]
        console.print("settings that differ, and metrics of the best rounds", style="italic")
        for table in comparison_tables([run.name for run in runs], columns, console.width):
            console.print(table)
        console.print(f"page     {written}", highlight=False, soft_wrap=True)
        if as_json:
            fields = {"page": str(written), "settings": differences, "runs": [_fields(run) for run in runs]}
            show_json(fields)
    return 0


def _fields(run: Summary) -> dict[str, object]:
    return {
        "name": run.name,
        "folder": str(run.run.folder),
        "best_round": run.run.best.round,
        "rounds": sum(record.finished for number, record in run.run.rounds.items() if number),
        "metrics": dict(run.best),
    }
