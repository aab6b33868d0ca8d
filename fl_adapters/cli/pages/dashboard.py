"""Command `fl-adapters dashboard`: web pages on the loopback that follow runs, or a federation."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_dashboard_extra


def dashboard(runs: Path, kit: Path | None, port: int, browse: bool, as_json: bool) -> int:
    """Serve the dashboard of a folder of runs, or of a federation, until it is interrupted. Returns exit status 0."""
    with report_errors(as_json):
        with needs_dashboard_extra():
            from fl_adapters.dashboard.federation.sections import federation_sections
            from fl_adapters.dashboard.runs.section import RunsSection
            from fl_adapters.dashboard.server import Dashboard

        board = Dashboard([RunsSection(runs)] if kit is None else federation_sections(kit), port)

        def started() -> None:
            console = console_for(as_json)
            console.print(f"dashboard   {board.address}", highlight=False, soft_wrap=True)
            console.print("The address has a key to the pages: it is for you alone. Ctrl-C ends the dashboard.")
            if as_json:
                show_json({"address": board.address})
            if browse:
                webbrowser.open(board.address)

        board.serve(started)
    return 0
