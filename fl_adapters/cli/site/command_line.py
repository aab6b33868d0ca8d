"""Command `fl-adapters site`: reports errors and the end of the daemon."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.cli.log_lines import LogOptions
from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def run(
    kit: Path,
    state: Path | None,
    restarts: int,
    grace_s: float,
    log: LogOptions,
    metrics: str,
    as_json: bool,
) -> int:
    """Run the daemon until it is stopped. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_adapters.cli.site.daemon import DaemonOptions, run_daemon
        from fl_runtime.trust.working_kit import working_kit

        kit = working_kit(kit, state)
        jobs = run_daemon(DaemonOptions(kit, state or kit, restarts, grace_s, log, metrics))
        if as_json:
            show_json({"unfinished": jobs})
    return 0
