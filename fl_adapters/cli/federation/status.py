"""Command `fl-adapters status`: shows the jobs of a federation's server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_adapters.cli.federation.connection import connected
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def run(kit_folder: Path, as_json: bool) -> int:
    """Ask the server and show its answer. Returns exit status 0."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.kits import read_kit

        kit = read_kit(kit_folder)
        with connected(kit) as control:
            status = control.ask("Status")
        _show(console, status)
        if as_json:
            show_json(status)
    return 0


def _show(console: Console, status: Mapping[str, Any]) -> None:
    console.print(
        f"{status['federation']}, fl-adapters {status['version']}: {len(status['sites'])} sites", highlight=False
    )
    versions = status.get("site_versions", {})
    for site, state in status.get("site_states", {}).items():
        console.print(f"  {site}: {state}{of_version(versions.get(site))}", highlight=False, soft_wrap=True)
    for site, text in status.get("misfits", {}).items():
        told = f"warning: fl-adapters {versions.get(site, '')} at {site} {text}"
        console.print(told, style="yellow", highlight=False, soft_wrap=True)
    for job in status["jobs"]:
        console.print(f"{job['job']} by {job['submitted_by']}: {job_state(job)}", highlight=False, soft_wrap=True)
        if "phase" in job:
            table = Table("site", "state")
            for site, state in job["site_states"].items():
                table.add_row(site, state)
            console.print(table)
    if not any("phase" in job for job in status["jobs"]):
        console.print("no job is running")


def of_version(version: str | None) -> str:
    """The version of a site's fl-adapters, as it follows the site's state; "" if it is not known."""
    return f"; fl-adapters {version}" if version else ""


def job_state(job: Mapping[str, Any]) -> str:
    """Where a job stands, in a few words.

    Args:
        job: A job of the server's answer.

    Returns:
        Such as "training, round 3 of 10", "queued" or "failed: ...".
    """
    if "phase" in job:
        return f"{job['phase']}, round {job['round']} of {job['rounds'] or '?'}"
    if job.get("error"):
        return f"{job['state']}: {job['error']['what']}"
    if job.get("waits_for"):
        return f"{job['state']}, waits for {job['waits_for']}"
    return f"finished, {job['rounds_done']} rounds" if job["state"] == "finished" else str(job["state"])
