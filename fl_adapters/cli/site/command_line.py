"""Command `fl-adapters site`: reports errors and the end of the daemon."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError


def run(
    kit: Path,
    state: Path | None,
    restarts: int,
    grace_s: float,
    log_format: str,
    log_file: Path | None,
    metrics: str,
    as_json: bool,
) -> int:
    """Run the daemon until it is stopped. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_adapters.cli.site.daemon import DaemonOptions, run_daemon
        from fl_adapters.cli.site.log_lines import LogFormat
        from fl_runtime.trust.working_kit import working_kit

        if log_format not in ("text", "json"):
            raise ConfigError(f"--log-format cannot be {log_format!r}", fix="use text or json")
        kit = working_kit(kit, state)
        style: LogFormat = "json" if log_format == "json" else "text"
        jobs = run_daemon(DaemonOptions(kit, state or kit, restarts, grace_s, style, log_file, metrics))
        if as_json:
            show_json({"unfinished": jobs})
    return 0
