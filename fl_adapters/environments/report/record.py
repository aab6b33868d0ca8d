"""What a finished or running training has left in its folder, read for reports."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fl_adapters.environments.progress import ordered_metrics
from fl_adapters.environments.report.privacy import SERVER, PrivacyCosts
from fl_adapters.job import site_names
from fl_runtime.errors import ConfigError
from fl_runtime.text import by_number, parse_json, printable
from fl_runtime.trainings import EVENTS, number_of, training_folder, training_name
from fl_runtime.yaml_files import read_yaml

_LINE_BYTES = 2**24
_USED = ("used", "carried")
_REPORTED = ("spent", "sent")


@dataclass
class SiteRound:
    """One site in one round.

    Attributes:
        status: What became of the site's update, such as "used"; "" if none arrived.
        num_examples: Training examples behind the update.
        local_steps: Optimizer steps behind the update.
        seconds: Seconds from the start of the round to the arrival of the update: exchange and training.
        train_s: Seconds of training in them; None if the site has not told.
        bytes_up: Bytes from the site to the server.
        bytes_down: Bytes from the server to the site.
        metrics: Metrics of the site's training, and of the round's model on the site's validation data.
    """

    status: str = ""
    num_examples: int = 0
    local_steps: int = 0
    seconds: float = 0.0
    train_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class RoundRecord:
    """One round.

    Attributes:
        seconds: Seconds from the start of the round to its model.
        finished: Whether the round has a model.
        metrics: Metrics over all sites.
        sites: Each site's part, by name.
    """

    seconds: float = 0.0
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    sites: dict[str, SiteRound] = field(default_factory=dict)

    @property
    def bytes_up(self) -> int:
        """Bytes from all sites to the server."""
        return sum(site.bytes_up for site in self.sites.values())

    @property
    def bytes_down(self) -> int:
        """Bytes from the server to all sites."""
        return sum(site.bytes_down for site in self.sites.values())


@dataclass
class FilterUse:
    """A filter that ran on updates.

    Attributes:
        settings: Its name and arguments.
        sites: Names of the sites whose updates it ran on; that of the server for a filter that runs there.
    """

    settings: Mapping[str, Any]
    sites: set[str] = field(default_factory=set)


@dataclass
class FilterRecord:
    """The filters of a run, and what it has spent of privacy.

    Attributes:
        used: Filters that ran on updates or at the server, in the order of first use.
        privacy: Epsilon that filters and DP-SGD have spent.
    """

    used: list[FilterUse] = field(default_factory=list)
    privacy: PrivacyCosts = field(default_factory=PrivacyCosts)


@dataclass
class BestRound:
    """Which round of a run is the best.

    Attributes:
        round: Its number, or None.
        metric: The metric that decides; "" before a model has been scored.
        missing: Why there is none; "" if there is one, or if the run has not ended.
    """

    round: int | None = None
    metric: str = ""
    missing: str = ""


@dataclass
class RunRecord:
    """One training, as its events tell it.

    Attributes:
        folder: Its folder: `runs/<job>`, or `runs/<job>/2` for the second training of a script.
        name: Name of the run; "job/2" for the second training.
        job: Fields of job.yml; empty where there is none.
        command: Fields of simulation.json: arguments of the script, sites; empty where there is none.
        planned: Number of rounds that the sites agreed on, or None if the run did not come so far.
        rounds: The rounds by number. Round 0 is the initial model.
        best: The best round.
        frameworks: What each site trains with, by site.
        filters: Its filters, and what it has spent of privacy.
        matrix: Cross-site evaluation: model, then site, then metric; None without one.
        warnings: Warnings, in order.
        failed: Why the run failed; "" if it did not.
        ended: Whether the run has ended.
        began: Time of the first event, in seconds since the epoch; 0 without events.
        last: Time of the last event, in seconds since the epoch.
    """

    folder: Path
    name: str
    job: Mapping[str, Any] = field(default_factory=dict)
    command: Mapping[str, Any] = field(default_factory=dict)
    planned: int | None = None
    rounds: dict[int, RoundRecord] = field(default_factory=dict)
    best: BestRound = field(default_factory=BestRound)
    frameworks: dict[str, str] = field(default_factory=dict)
    filters: FilterRecord = field(default_factory=FilterRecord)
    matrix: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
    warnings: list[str] = field(default_factory=list)
    failed: str = ""
    ended: bool = False
    began: float = 0.0
    last: float = 0.0

    @property
    def job_folder(self) -> Path:
        """Folder of the job, which holds that of each training."""
        return self.folder if number_of(self.name) == 1 else self.folder.resolve().parent

    @property
    def site_argument(self) -> str:
        """The sites that the run was started with, as the option `--sites` takes them: a number, or names."""
        names = tuple(listed(self.command, "sites")) or tuple(self.sites)
        return str(len(names)) if not names or names == site_names(len(names)) else ",".join(names)

    @property
    def is_sums(self) -> bool:
        """Whether this is no training but sums over all sites, as of means for a `StandardScaler`."""
        return self.planned == 0

    @property
    def sites(self) -> list[str]:
        """Names of all sites that took part, in order: site-2 comes before site-10."""
        return sorted({name for record in self.rounds.values() for name in record.sites}, key=by_number)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics: the one that decides the best round and the loss first, those of training last."""
        everywhere: dict[str, float] = {}
        at_sites: dict[str, float] = {}
        for record in self.rounds.values():
            everywhere.update(record.metrics)
            for site in record.sites.values():
                at_sites.update(site.metrics)
        return ordered_metrics(dict.fromkeys([*everywhere, *at_sites]), self.best.metric)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Return a metric over all sites by round.

        Args:
            metric: Name of the metric.

        Returns:
            Round and value of each round that has one that is finite.
        """
        found = ((number, self.rounds[number].metrics.get(metric)) for number in sorted(self.rounds))
        return [(float(number), value) for number, value in found if value is not None and math.isfinite(value)]

    def site_curves(self, metric: str) -> dict[str, list[tuple[float, float]]]:
        """Return a metric of each site by round.

        Args:
            metric: Name of the metric.

        Returns:
            Round and value of each round that has one that is finite, by site, in the order of `sites`. Sites without
            any are missing.
        """
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in self.sites}
        for number in sorted(self.rounds):
            for name, part in self.rounds[number].sites.items():
                value = part.metrics.get(metric)
                if value is not None and math.isfinite(value):
                    found[name].append((float(number), value))
        return {name: points for name, points in found.items() if points}


class RunReader:
    """Reads the record of a training that may be under way: each `read` takes the events that are new.

    Args:
        folder: Its folder, which holds events.jsonl: of a simulation, or downloaded from a server.

    Raises:
        ConfigError: There is no events.jsonl in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / EVENTS
        if not self._path.is_file():
            raise ConfigError(
                f"there is no run in {folder}",
                where=str(self._path),
                fix="name the folder of a run, such as runs/NAME, or that of `fl-adapters job download`",
            )
        self._begin(0)

    def _begin(self, inode: int) -> None:
        whole = self._folder.resolve()
        is_later = whole.name.isdecimal() and (whole.parent / EVENTS).is_file()
        job = whole.parent if is_later else whole
        name = training_name(job.name, int(whole.name)) if is_later else job.name
        self._run = RunRecord(self._folder, name, _yaml(job / "job.yml"), _json(job / "simulation.json"))
        self._offset_bytes, self._inode = 0, inode

    def read(self) -> RunRecord:
        """Take the events that are new, and return the record, which belongs to this reader.

        Lines and fields that cannot be read are passed over, since a report must not fail by them.
        """
        with self._path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_size < self._offset_bytes or state.st_ino != self._inode:  # the run was begun anew
                self._begin(state.st_ino)
            file.seek(self._offset_bytes)
            while line := file.readline(_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < _LINE_BYTES:
                    break  # it is still being written
                self._offset_bytes += len(line)
                with suppress(KeyError, TypeError, ValueError, AttributeError):
                    _take(self._run, parse_json(line, limit_chars=_LINE_BYTES))
        return self._run


def read_run(folder: Path) -> RunRecord:
    """Read the record of a training.

    Args:
        folder: Its folder, which holds events.jsonl: of a simulation, or downloaded from a server.

    Returns:
        The record.

    Raises:
        ConfigError: There is no events.jsonl in the folder.
    """
    return RunReader(folder).read()


def read_trainings(folder: Path) -> list[RunRecord]:
    """Read the records of all trainings of a job.

    Args:
        folder: Folder of the job, which is that of its first training.

    Returns:
        The records, in order.

    Raises:
        ConfigError: There is no run in the folder.
    """
    runs = [read_run(folder)]
    while (later := training_folder(folder, len(runs) + 1) / EVENTS).is_file():
        runs.append(read_run(later.parent))
    return runs


def listed(fields: Mapping[str, Any], name: str) -> list[str]:
    """Return a field of a file that ought to hold a list.

    Args:
        fields: All fields of the file.
        name: Name of the field.

    Returns:
        The items as texts; none if the field is missing, or something else.
    """
    found = fields.get(name)
    return [str(item) for item in found] if isinstance(found, (list, tuple)) else []


def _take(run: RunRecord, event: Mapping[str, Any]) -> None:
    """Add an event to the record."""
    data, number, site = event["data"], int(event["round"]), _name(str(event["site"]))
    run.began, run.last = run.began or float(event["time"]), float(event["time"])
    match event["kind"]:
        case "registered":
            run.frameworks[site] = printable(str(data.get("info", {}).get("framework", "")), 100)
            run.filters.privacy.registered(site, data.get("info", {}))
        case "started":
            run.planned, run.ended, run.failed = int(data["rounds"]), False, ""
            run.filters.privacy.started(data.get("filters", []))
            for settings in data.get("filters", []):
                if str(settings.get("at", "")).startswith("server"):
                    _filter(run, SERVER, settings)
        case "task_sent" if data.get("task") == "train":
            _site(run, number, site).bytes_down = int(data["bytes"])
        case "update":
            _update(_site(run, number, site), data)
            for settings in data.get("filters", []):
                _filter(run, site, settings)
            run.filters.privacy.update(number, site, data.get("metrics", {}), data.get("filters", []))
        case "report":
            _site(run, number, site).metrics.update(_numbers(data["metrics"]))
        case "round_finished":
            seconds, metrics = float(data["seconds"]), _numbers(data["metrics"])
            record = _round(run, number)
            record.seconds, record.finished = seconds, True
            record.metrics.update(metrics)
            run.filters.privacy.round_finished(number, data)
        case "scored":
            metrics = _numbers(data["metrics"])
            _round(run, number).metrics.update(metrics)
            run.best.round = _best(data)
            run.best.metric = printable(str(data.get("best_metric", "")), 200)
        case "cross_site":
            run.matrix = _matrix(data["matrix"])
        case "warning":
            run.warnings.append(printable(str(data["text"]), 2000))
        case "finished":
            run.ended, run.best.round = True, _best(data)
            run.best.missing = printable(str(data.get("no_best") or ""), 2000)
        case "failed":
            run.ended, run.failed = True, printable(str(data["error"]["what"]), 2000)


def _best(data: Mapping[str, Any]) -> int | None:
    best = data.get("best_round")
    return best if isinstance(best, int) else None


def _update(part: SiteRound, data: Mapping[str, Any]) -> None:
    part.bytes_up += int(data.get("bytes_up", 0))
    if part.status in _USED and data["status"] not in _USED:
        return  # a late second one counts by its bytes alone
    part.status, part.seconds = printable(str(data["status"]), 100), float(data.get("seconds", 0.0))
    part.num_examples, part.local_steps = int(data.get("num_examples", 0)), int(data.get("local_steps", 0))
    if "train_s" in data:  # a site's own word: no longer than the server has waited for it
        part.train_s = min(max(0.0, float(data["train_s"])), part.seconds)
    part.metrics.update(_numbers(data.get("metrics", {})))


def _round(run: RunRecord, number: int) -> RoundRecord:
    record = run.rounds.get(number)
    if record is None:
        record = run.rounds[number] = RoundRecord()
    return record


def _site(run: RunRecord, number: int, name: str) -> SiteRound:
    sites = _round(run, number).sites
    part = sites.get(name)
    if part is None:
        part = sites[name] = SiteRound()
    return part


@lru_cache(maxsize=4096)
def _name(text: str) -> str:
    return printable(text, 100)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        _name(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _filter(run: RunRecord, site: str, settings: Mapping[str, Any]) -> None:
    """Record that a filter ran. What it reports anew in each round does not make it another filter."""
    lasting = {name: value for name, value in settings.items() if name not in _REPORTED}
    use = next((use for use in run.filters.used if use.settings == lasting), None)
    if use is None:
        use = FilterUse(lasting)
        run.filters.used.append(use)
    use.sites.add(site)


def _matrix(matrix: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        printable(model, 100): {printable(site, 100): _numbers(cell) for site, cell in row.items()}
        for model, row in matrix.items()
    }


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        fields = read_yaml(path, "job file") if path.is_file() else {}
    except ConfigError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        fields = parse_json(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
