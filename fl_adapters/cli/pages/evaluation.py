"""Command `fl-adapters evaluate`: score predictions that lie in a file of each site, on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fl_adapters.cli.live import print_path, shown_progress
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.environments.starting.site_data import parse_sites
from fl_adapters.job import Job

_PACKAGE = "fl_adapters.evaluation"


def job_fields(sites: str, name: str | None) -> dict[str, Any]:
    """Return the fields of a job for the options `--sites` and `--name`."""
    named = {} if name is None else {"name": name}
    return {"sites": parse_sites(sites), **named}


def evaluate(job: Mapping[str, Any], script: Sequence[str], folder: Path, as_json: bool) -> int:
    """Run the evaluation once per site, and show its tables. Returns exit status 0.

    Args:
        job: Fields of the job that were given as options: its sites and its name.
        script: Arguments of `python -m fl_adapters.evaluation`.
        folder: Folder that the run's own folder is made in.
        as_json: Whether to print the document as one line of JSON.
    """
    console = console_for(as_json)
    with report_errors(as_json):
        from fl_adapters.environments.simulation import Simulation

        with shown_progress(console) as listener:
            simulation = Simulation(args=script, module=True, folder=folder, listeners=(listener,), quiet=True)
            result = Job(app=_PACKAGE, **job).run(simulation)
        document = import_module(f"{_PACKAGE}.result")
        file = result.folder / document.FILE
        found = document.Evaluation.read(file)
        if as_json:
            show_json(json.loads(found.to_json()))
        else:
            console.print(str(found), highlight=False, soft_wrap=True)
            print_path(console, "scores", file)
    return 0
