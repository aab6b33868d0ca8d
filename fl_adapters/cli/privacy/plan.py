"""Command `fl-adapters privacy plan`: the noise that a privacy budget takes, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.job import Job
from fl_runtime.aggregation import make_strategy
from fl_runtime.errors import ConfigError
from fl_runtime.filters import PlacedFilter, place_filter
from fl_runtime.filters.calibration import participation, rounded_up
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.filters.ledger import UNITS, epsilon

_FACTORS = (0.25, 0.5, 1, 2, 4)  # of the number of rounds
_SITES = 2  # without a number of sites all of them take part in every round, however many there are


def run(job_file: Path | None, of_filter: Mapping[str, Any], of_job: Mapping[str, Any], as_json: bool) -> int:
    """Show the plan. Returns exit status 0.

    Args:
        job_file: Job file with a filter `GaussianDP`, or None.
        of_filter: Arguments of the filter; None where the job file, or else the default decides.
        of_job: Fields of the job likewise.
        as_json: Print one JSON object.
    """
    with report_errors(as_json):
        settings, job = _settings(job_file, of_filter, of_job)
        placed = place_filter(settings)
        dp: GaussianDP = placed.filter
        if dp.epsilon is None:
            raise ConfigError("there is no budget to plan for", where="--epsilon", fix="give --epsilon, such as 8")
        rows = [
            _row(placed, job, rounds) for rounds in sorted({max(1, round(f * (job.rounds or 1))) for f in _FACTORS})
        ]
        fields = {
            "protects": UNITS["update"],
            "rounds": job.rounds,
            "filter": settings,
            "noise_multiplier": next(row["noise_multiplier"] for row in rows if row["rounds"] == job.rounds),
            "rows": rows,
        }
        _show(fields, dp, job, as_json)
        if as_json:
            show_json(fields)
    return 0


def _settings(
    job_file: Path | None, of_filter: Mapping[str, Any], of_job: Mapping[str, Any]
) -> tuple[dict[str, Any], Job]:
    """Return the settings of the filter, and the job."""
    given = {name: value for name, value in of_job.items() if value is not None}
    job = Job.from_file(job_file, **given) if job_file else Job(app="plan", **given)
    found = next((dict(item) for item in job.filters if item.get("name") == "GaussianDP"), {"name": "GaussianDP"})
    if job_file and "epsilon" not in found and of_filter.get("epsilon") is None:
        raise ConfigError(
            "the job has no filter GaussianDP with a budget", where=str(job_file), fix="add one, or give --epsilon"
        )
    found |= {name: value for name, value in of_filter.items() if value is not None}
    if "epsilon" not in found:
        raise ConfigError("there is no budget to plan for", where="--epsilon", fix="give --epsilon, such as 8")
    if job.rounds is None:
        raise ConfigError("the number of rounds is not known", where="--rounds", fix="give --rounds, such as 20")
    found.pop("noise_multiplier", None)
    return found, job


def _row(placed: PlacedFilter, job: Job, rounds: int) -> dict[str, Any]:
    """Return the noise for a number of rounds."""
    dp: GaussianDP = placed.filter
    releases = rounds
    if placed.at == "site_out":
        settings = replace(job.settings(_names(job)), rounds=rounds)
        plans = participation(settings, make_strategy(str(job.strategy)))
        releases = max(plan.most for plan in plans.values())
    releases *= job.trainings or 1
    noise = rounded_up(dp.multiplier(max(1, releases)))
    return {
        "rounds": rounds,
        "updates_of_a_site": releases,
        "noise_multiplier": noise,
        "epsilon_of_a_round": round(epsilon([dp.release(noise)], dp.delta), 6),
        "noise_of_a_number": round(noise * dp.clip, 6),
    }


def _names(job: Job) -> tuple[str, ...]:
    names = job.sites or _SITES
    return tuple(f"site-{number}" for number in range(names)) if isinstance(names, int) else names


def _show(fields: Mapping[str, Any], dp: GaussianDP, job: Job, as_json: bool) -> None:
    console = console_for(as_json)
    if not console.is_terminal:
        console.width = 120
    console.print(
        f"Noise for epsilon {dp.epsilon:g} at delta {dp.delta:g}, clip {dp.clip:g}. It protects {fields['protects']},\n"
        "not a single record of its data.",
        highlight=False,
    )
    table = Table(
        "rounds", "updates of a site", "noise multiplier", "epsilon of a round", "noise on each number", box=None
    )
    for row in fields["rows"]:
        marked = ">" if row["rounds"] == job.rounds else " "
        numbers = [f"{row[n]:.4g}" for n in ("noise_multiplier", "epsilon_of_a_round", "noise_of_a_number")]
        table.add_row(f"{marked} {row['rounds']}", str(row["updates_of_a_site"]), *numbers)
    console.print(table)
    if job.fraction < 1 and job.sites is None:
        console.print("Give --sites: without their number, every site is taken to be in every round.")
    line = yaml.safe_dump([fields["filter"]], default_flow_style=True, sort_keys=False, width=10_000).strip()
    console.print("In the job file, from which the noise is computed:", highlight=False)
    console.print(f"  filters: {line}", highlight=False, soft_wrap=True)
