"""What `fl-adapters job ...` does with the jobs of a federation, over an admin's kit."""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_adapters.cli.federation.status import job_state, of_version
from fl_adapters.cli.live import print_next, rounds_table, shown_progress
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.pages.comparison_table import comparison_tables
from fl_adapters.environments.download import event_files, event_key
from fl_adapters.environments.production import Production, connected
from fl_adapters.environments.progress.text import event_text
from fl_adapters.environments.remote import earlier_jobs
from fl_adapters.environments.remote import submit as put_into_queue
from fl_adapters.environments.tracking import Tracker
from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.job import Job
from fl_runtime.aggregation.metrics.pooling import from_json, plain
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError
from fl_runtime.text import printable
from fl_runtime.trainings import EVENTS

_OUTCOME = "outcome.json"


@contextmanager
def _connected(kit_folder: Path, as_json: bool) -> Iterator[ControlClient]:
    """A connection with an admin's kit; errors in the block end the command."""
    with report_errors(as_json), connected(kit_folder) as (control, _):
        yield control


def submit(kit: Path, file: Path, priority: int, follow_it: bool, as_json: bool, track: tuple[str, ...] = ()) -> int:
    """Submit the job of a file. Returns the exit status."""
    with _connected(kit, as_json) as control:
        job = Job.from_file(file)
        track = (*job.track, *track)
        if track and not follow_it:
            raise ConfigError(
                "a job is tracked by the command that follows it",
                where=f"track: {track[0]}",
                fix="add --follow, or submit it without track and use `fl-adapters job follow JOB --track ...`",
            )
        trackers = make_trackers(track)  # reports what is missing before the job is in the queue
        name = put_into_queue(control, job, priority=priority)
        print(f"{name} is in the queue; to follow it: fl-adapters job follow {name} --kit {kit}", file=sys.stderr)
        if not follow_it:
            if as_json:
                show_json(control.ask("ShowJob", job=name))
            return 0
    return follow(kit, name, None, as_json, trackers)


def list_jobs(kit: Path, before: int | None, as_json: bool) -> int:
    """List the federation's jobs, or older ones that have ended. Returns exit status 0."""
    with _connected(kit, as_json) as control:
        status = control.ask("Status") if before is None else earlier_jobs(control.ask, before)
    jobs, older = status["jobs"], status.get("older")
    table = Table("job", "state", "sites", "submitted by", "submitted")
    for job in jobs:
        sites = ", ".join(job["sites"]) if len(job["sites"]) < 5 else f"{len(job['sites'])} sites"
        table.add_row(job["job"], job_state(job), sites, job["submitted_by"], _clock(job["submitted_at"]))
    none = "there are no jobs yet; submit one with `fl-adapters job submit`" if before is None else "no job is older"
    console_for(as_json).print(table if jobs else none)
    if older is not None:
        print(f"for older jobs: fl-adapters job list --kit {kit} --before {older}", file=sys.stderr)
    if as_json:
        show_json({"jobs": jobs, "older": older})
    return 0


def show(kit: Path, name: str, as_json: bool) -> int:
    """Show one job. Returns exit status 0."""
    with _connected(kit, as_json) as control:
        job = control.ask("ShowJob", job=name)
    console = console_for(as_json)
    console.print(f"{job['job']} by {job['submitted_by']}: {job_state(job)}", highlight=False, soft_wrap=True)
    times = [f"{what} {_clock(job[f'{what}_at'])}" for what in ("submitted", "started", "ended") if job[f"{what}_at"]]
    console.print(", ".join(times), highlight=False)
    versions = job.get("versions", {})
    for site, state in (job.get("site_states") or dict.fromkeys(versions, "has taken part")).items():
        console.print(f"  {site}: {state}{of_version(versions.get(site))}", highlight=False, soft_wrap=True)
    settings = {key: value for key, value in job["settings"].items() if value not in (None, (), [], {}, "")}
    table = Table("setting", "value")
    for key, value in settings.items():
        table.add_row(key, json.dumps(value) if not isinstance(value, str) else value)
    console.print(table)
    for item in job.get("files", ()):
        console.print(f"  {item['path']}, {item['size_bytes']} bytes", highlight=False)
    for text in _about_files(job.get("outcome") or {}):
        console.print(text, highlight=False, soft_wrap=True)
    if job.get("files"):
        console.print(f"to fetch them: fl-adapters job download {name} --kit {kit}", highlight=False)
    if as_json:
        show_json(job)
    return 0


def follow(kit: Path, name: str, patience_s: float | None, as_json: bool, track: Sequence[str | Tracker] = ()) -> int:
    """Follow a job to its end. Returns exit status 0; the error of a failed job ends the command."""
    console = console_for(as_json)
    with report_errors(as_json):
        with shown_progress(Console(stderr=True, markup=False, emoji=False)) as listener:
            result = Production(kit, (listener,), quiet=True, patience_s=patience_s, trackers=track).attach(name)
        if not as_json:
            several = len(result.trainings) > 1
            for number, rounds in enumerate(result.trainings, 1):
                title = f"{name}, training {number}" if several else name
                best_round = result.best_round if number == 1 else None
                console.print(rounds_table(rounds, best_round, title, listener.view.best_metric, console.width))
        best = f", the best was round {result.best_round}" if result.best_round else ""
        print(f"{name}: {len(result.rounds)} rounds{best}", file=sys.stderr)
        print(f"to fetch the models: fl-adapters job download {name} --kit {kit}", file=sys.stderr)
        if as_json:
            show_json(
                {
                    "job": name,
                    "rounds": [item.to_json() for item in result.rounds],
                    "best_round": result.best_round,
                    "bytes_up": result.bytes_up,
                    "bytes_down": result.bytes_down,
                }
            )
    return 0


def logs(kit: Path, name: str, patience_s: float | None, as_json: bool, *, to_the_end: bool) -> int:
    """Print the events of a job so far, or to its end. Returns exit status 0."""
    with report_errors(as_json), connected(kit) as (control, own_patience_s):
        printed = set()
        for event in _events_so_far(control, name, may_be_none=to_the_end):
            printed.add(event_key(event))
            _print_event(name, event, as_json)
        if to_the_end:
            for answer in control.follow(name, patience_s=own_patience_s if patience_s is None else patience_s):
                if "event" in answer and event_key(answer["event"]) not in printed:
                    _print_event(name, answer["event"], as_json)
    return 0


def _events_so_far(control: ControlClient, name: str, *, may_be_none: bool) -> Iterator[Mapping[str, Any]]:
    """Yield the events in a job's folder. `may_be_none` allows that it has not begun."""
    if may_be_none and control.ask("ShowJob", job=name)["state"] == "queued":
        print(f"{name} waits in the queue", file=sys.stderr, flush=True)
        return
    trainings = [list(_events_in(data.decode(errors="replace"))) for data in event_files(control, name)]
    yield from heapq.merge(*trainings, key=lambda event: float(event["time"]))


def _events_in(text: str) -> Iterator[Mapping[str, Any]]:
    for line in text.splitlines():
        try:
            event = json.loads(line)
            event_key(event)
        except (ValueError, KeyError, TypeError):  # the last line may not be whole yet
            continue
        yield event


def _print_event(name: str, event: Mapping[str, Any], as_json: bool) -> None:
    told = f"{_clock(event['time'])} {name} {event['site'] or 'server'}: {event_text(event)}"
    print(json.dumps(event) if as_json else printable(told, 400), flush=True)


def change(kit: Path, call: str, name: str, as_json: bool) -> int:
    """Make a call that changes a job. Returns exit status 0."""
    with _connected(kit, as_json) as control:
        answer = control.ask(call, job=name)
    said = {"AbortJob": "aborted", "ResumeJob": "back in the queue", "DeleteJob": "deleted"}[call]
    console_for(as_json).print(f"{name}: {said}", highlight=False)
    if as_json:
        show_json(answer)
    return 0


def fetch(kit: Path, name: str, folder: Path, patience_s: float | None, as_json: bool) -> int:
    """Download the result files of a job. Returns exit status 0."""
    with report_errors(as_json):
        files = Production(kit, patience_s=patience_s).download(name, folder)
    console = console_for(as_json)
    for path in files:
        console.print(str(path), highlight=False, soft_wrap=True)
    for training in [path.parent for path in files if path.name == EVENTS]:
        exported = next((training / which for which in ("best", "model") if (training / which).is_dir()), None)
        print_next(console, training, exported)
    with suppress(OSError, ValueError, AttributeError):  # a server of an earlier version has left none
        for text in _about_files(json.loads((folder / _OUTCOME).read_text("utf-8"))):
            console.print(text, highlight=False, soft_wrap=True)
    if as_json:
        show_json({"job": name, "folder": str(folder), "files": [str(path) for path in files]})
    return 0


def _about_files(outcome: Mapping[str, Any]) -> Iterator[str]:
    """Say from which site the small files beside a job's models are, and which sites sent others."""
    trainings = outcome.get("trainings") or [outcome]
    for number, training in enumerate(trainings, 1):
        files = training.get("files")
        if files:
            place = f"training {number}, " if len(trainings) > 1 else ""
            yield printable(f"{place}model/: {', '.join(files['names'])} are those of {files['site']}", 2000)
            for site, names in files["different"].items():
                yield printable(f"warning: {place}{site} sent another {', '.join(names)}", 2000)


def compare(kit: Path, names: Sequence[str], as_json: bool) -> int:
    """Show the settings in which jobs differ, and the metrics of their best rounds. Returns exit status 0."""
    with _connected(kit, as_json) as control:
        jobs = {name: control.ask("ShowJob", job=name) for name in names}
    settings: dict[str, dict[str, Any]] = {}
    for key in {key: None for job in jobs.values() for key in job["settings"] if key not in ("name", "submitted_by")}:
        values = {name: job["settings"].get(key) for name, job in jobs.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            settings[key] = values
    best = {name: _best_metrics(job) for name, job in jobs.items()}
    columns = {"state": [job_state(job) for job in jobs.values()]}
    for key, values in settings.items():
        columns[key] = [json.dumps(values[name]) for name in names]
    for metric in {metric: None for metrics in best.values() for metric in metrics}:
        columns[metric] = [f"{best[name][metric]:.4g}" if metric in best[name] else "" for name in names]
    console = console_for(as_json)
    for table in comparison_tables(names, columns, console.width):
        console.print(table)
    if as_json:
        states = {name: job["state"] for name, job in jobs.items()}
        show_json({"jobs": list(names), "states": states, "settings": settings, "best": best})
    return 0


def _best_metrics(job: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a job's best round, or of its last one if none is the best; none before its end."""
    outcome = job.get("outcome") or {}
    rounds = outcome.get("rounds", [])
    chosen = [item for item in rounds if item["round"] == outcome.get("best_round")] or rounds[-1:]
    return plain(from_json(chosen[0]["metrics"])) if chosen else {}


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
