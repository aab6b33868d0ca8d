"""Command `fl-adapters privacy show`: shows what has been spent of a privacy budget, and by which jobs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.participant.kit import KIT_VARIABLE, kit_in_use
from fl_runtime.errors import ConfigError
from fl_runtime.filters.ledger import LEDGER_FILE, UNITS, Entry, Ledger, epsilon
from fl_runtime.trainings import job_of

_SHOWN = 20


def run(folder: Path | None, delta: float, as_json: bool) -> int:
    """Show all ledgers in a folder. Returns exit status 0."""
    with report_errors(as_json):
        if not 0 < delta < 1:
            raise ConfigError(
                f"delta {delta:g} is out of range", where="--delta", fix="give a number between 0 and 1, such as 1e-5"
            )
        ledgers = [_ledger(path, delta) for path in _paths(_folder(folder))]
        if as_json:
            show_json({"delta": delta, "ledgers": ledgers})
        else:
            for ledger in ledgers:
                _show(ledger, delta, console_for(as_json=False))
    return 0


def _folder(given: Path | None) -> Path:
    name = given or os.environ.get(KIT_VARIABLE)
    if name is None:
        raise ConfigError(
            "no folder was named", where="FOLDER", fix=f"name a startup kit or a run's folder, or set {KIT_VARIABLE}"
        )
    return kit_in_use(Path(name))


def _paths(folder: Path) -> list[Path]:
    files = sorted(folder.rglob(LEDGER_FILE)) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            "there is no privacy ledger in this folder",
            where=str(folder),
            fix="name a startup kit, or runs/JOB; a ledger begins with the first round of a filter with a privacy "
            "budget",
        )
    return files


def _ledger(path: Path, delta: float) -> dict[str, Any]:
    ledger = Ledger(path.parent)
    try:
        entries = ledger.entries()
    finally:
        ledger.close()
    return {
        "path": str(path),
        "totals": [
            {"protects": unit, "epsilon": _epsilon(of, delta)}
            for unit in UNITS
            if (of := [entry for entry in entries if entry.mechanism.unit == unit])
        ],
        "jobs": job_totals(entries, delta),
        "entries": [_fields(entry) for entry in entries],
    }


def job_totals(entries: Sequence[Entry], delta: float) -> list[dict[str, Any]]:
    """Return what each job has spent with all its trainings, one row for each unit of privacy.

    Args:
        entries: Entries of one ledger.
        delta: The delta at which epsilon is stated.

    Returns:
        Rows with job, unit ("protects"), number of rounds, and epsilon, in the order in which the jobs began.
    """
    kinds = dict.fromkeys((job_of(entry.job), entry.mechanism.unit) for entry in entries)
    rows = []
    for job, unit in kinds:
        own = [entry for entry in entries if (job_of(entry.job), entry.mechanism.unit) == (job, unit)]
        rounds = len({(entry.job, entry.round) for entry in own})
        rows.append({"job": job, "protects": unit, "rounds": rounds, "epsilon": _epsilon(own, delta)})
    return rows


def _epsilon(entries: Sequence[Entry], delta: float) -> float:
    return round(epsilon([entry.mechanism for entry in entries], delta), 6)


def _fields(entry: Entry) -> dict[str, Any]:
    mechanism = entry.mechanism
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.at)),
        "job": entry.job,
        "round": entry.round,
        "filter": entry.filter,
        "mechanism": mechanism.kind,
        "noise": mechanism.noise,
        "sampling": mechanism.sampling,
        "count": mechanism.count,
        "protects": mechanism.unit,
    }


def _show(ledger: dict[str, Any], delta: float, console: Console) -> None:
    if not console.is_terminal:
        console.width = 120
    console.print(ledger["path"], highlight=False, soft_wrap=True)
    totals = Table("job", "rounds", f"epsilon at delta {delta:g}", "protects", box=None)
    for row in (*ledger["jobs"], *({"job": "all jobs", "rounds": "", **total} for total in ledger["totals"])):
        totals.add_row(row["job"], str(row["rounds"]), f"{row['epsilon']:.4g}", UNITS[row["protects"]])
    console.print(totals)
    lines = Table("at", "job", "round", "filter", "mechanism", "noise", "sampling", "count", "protects", box=None)
    for entry in ledger["entries"][-_SHOWN:]:
        lines.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in entry.values()))
    console.print(lines)
    if len(ledger["entries"]) > _SHOWN:
        console.print(f"(the last {_SHOWN} of {len(ledger['entries'])} entries; --json gives all)")
