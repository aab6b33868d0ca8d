"""The history of a run: `events.jsonl`, `history.csv` and TensorBoard scalars.

After a cross-site evaluation there are `cross_site.csv` and `cross_site.json`, too.

`history.csv` has a row per round and site, and a row per round with the site "global", which holds the pooled metrics.
A site's row holds the metrics of its training in that round (`train_...`), and the metrics of that round's model on the
site's validation data (plain names). Round 0 is the initial model. The rows of a round are written once its model has
been scored, or two rounds later. `pandas.read_csv` reads the file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fl_runtime.server.records.scalars import ScalarWriter
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trainings import EVENTS, HISTORY
from fl_runtime.types import Event

GLOBAL = "global"
_SITES_PLOTTED = 32  # curves of more sites would only slow TensorBoard down
COLUMNS = ("round", "site", "status", "num_examples", "local_steps", "seconds", "train_s", "bytes_up", "bytes_down")

Row: TypeAlias = dict[str, Any]


class History:
    """A listener that writes a run's history into a folder (`runs/<job>`).

    An existing events.jsonl is continued: an incomplete last line is cut off, and history.csv is made again from the
    events. A disk that fails later does not stop the run, since the server continues from its journal and not from the
    history. The failure is reported on stderr, once until the disk works again.

    Example:
        ```python
        history = History(Path("runs/job"))
        server = Server(settings, Path("runs/job"), tokens, listeners=[history])
        ...
        server.close()
        history.close()
        ```
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the files.

        Args:
            folder: Folder of the run; it is made if it does not exist.

        Raises:
            StoreError: The files cannot be written.
        """
        self._failed, self._failures, self._folder = False, 0, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            events = folder / EVENTS
            self._table = _Table(folder / HISTORY)
            self._plotted: set[str] = set()
            plotted = (folder / "tensorboard").exists()
            self._scalars = ScalarWriter(folder / "tensorboard")
            for event in _past_events(events):
                self._table.record(event)
                if not plotted:  # another server has written them
                    self._plot(event)
            self._events = events.open("a", encoding="utf-8")
        except OSError as error:
            raise disk_error(error, folder) from error

    def __call__(self, event: Event) -> None:
        """Record an event. Must not be called by two threads at once.

        Args:
            event: The next event of the run.
        """
        if event.kind == "steps":  # of passing interest
            return
        failures = self._failures
        with self._disk_may_fail():
            self._events.write(event_line(event))
            self._events.flush()
        with self._disk_may_fail():
            self._table.record(event)
        with self._disk_may_fail():
            self._plot(event)
            if event.kind == "cross_site":
                write_matrix(self._folder, event.data["matrix"])
        self._failed = self._failures > failures

    def close(self) -> None:
        """Write the rows that are still open, and close the files. Called once, after the last event."""
        with self._disk_may_fail():
            self._table.flush()
        for file in (self._events, self._scalars):
            with self._disk_may_fail():
                file.close()

    @contextmanager
    def _disk_may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"fl-adapters: the history cannot be written: {error}", file=sys.stderr)
            self._failed = True
            self._failures += 1

    def _plot(self, event: Event) -> None:
        if event.kind not in ("update", "report", "round_finished", "scored"):
            return
        if event.site and event.site not in self._plotted:
            if len(self._plotted) == _SITES_PLOTTED:
                return
            self._plotted.add(event.site)
        for name, value in event.data.get("metrics", {}).items():
            self._scalars.add(f"{name}/{event.site or GLOBAL}", value, event.round, event.time)
        if event.kind == "round_finished":
            for name in ("seconds", "bytes_up", "bytes_down"):
                self._scalars.add(f"round/{name}", event.data[name], event.round, event.time)
            self._scalars.flush()


class _Table:
    """Builds the rows of history.csv from events. Only rounds that may still change are kept in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._open: dict[int, dict[str, Row]] = {}
        self._flushed = -1  # the newest round that has been written
        self._widen(list(COLUMNS))

    def record(self, event: Event) -> None:
        data = event.data
        match event.kind:
            case "round_started":
                for site in data["sites"]:
                    self._row(event.round, site)
            case "task_sent" if event.round in self._open and event.site in self._open[event.round]:
                self._row(event.round, event.site).setdefault("bytes_down", data["bytes"])
            case "update":
                self._update(event)
            case "report":
                self._fill(event.round, event.site, metrics=data["metrics"])
            case "round_finished":
                self._round_finished(event)
            case "scored":
                self._fill(event.round, GLOBAL, metrics=data["metrics"])
                self.flush(event.round)
            case "round_dropped":
                self._open.pop(event.round, None)
            case "finished":  # not "failed": a run that is resumed goes on with its open rounds
                self.flush()

    def flush(self, until: int | None = None) -> None:
        """Write the open rounds up to and including `until`, or all of them."""
        done = sorted(number for number in self._open if until is None or number <= until)
        rows = [row for number in done for row in self._in_order(self._open[number])]
        if rows:
            self._write(rows)
            self._flushed = max(self._flushed, *done)
        for number in done:
            del self._open[number]

    def _write(self, rows: list[Row]) -> None:
        """Append all of these rows or, on a full disk, none."""
        new = {name: None for row in rows for name in row if name not in self._columns}
        if new:
            self._widen([*self._columns, *new])
        size = os.stat(self._path).st_size
        try:
            with open(self._path, "a", encoding="utf-8", newline="") as out:
                csv.DictWriter(out, self._columns).writerows(rows)
        except OSError:
            os.truncate(self._path, size)
            raise

    def _update(self, event: Event) -> None:
        data = event.data
        if data["status"] == "duplicate":
            return
        if event.round <= self._flushed and data["status"] in ("late", "buffered"):
            self._open.setdefault(event.round, {})  # the round is written already: the update gets a row of its own
        self._fill(event.round, event.site, **{name: data[name] for name in COLUMNS if name in data})
        self._fill(event.round, event.site, metrics=data.get("metrics"))
        if data.get("filters"):  # what ran on the update before it left, in order
            self._fill(event.round, event.site, filters=" > ".join(str(item.get("name")) for item in data["filters"]))

    def _round_finished(self, event: Event) -> None:
        data = event.data
        for site in data["missing"]:
            self._row(event.round, site)["status"] = "missing"
        # in a buffered run, a round of a site is not the model's round
        used = [] if data.get("buffered") else [self._row(event.round, site) for site in data["sites"]]
        self._fill(
            event.round,
            GLOBAL,
            num_examples=data.get("num_examples", sum(row.get("num_examples") or 0 for row in used)),
            local_steps=data.get("local_steps", sum(row.get("local_steps") or 0 for row in used)),
            seconds=data["seconds"],
            bytes_up=data["bytes_up"],
            bytes_down=data["bytes_down"],
            metrics=data["metrics"],
        )
        self.flush(event.round - 2)  # the scores of the round before may still be on their way

    def _row(self, number: int, site: str) -> Row:
        """The row to fill in; if the round is written already, a row that is thrown away."""
        if number <= self._flushed and number not in self._open:
            return {}
        return self._open.setdefault(number, {}).setdefault(site, {"round": number, "site": site})

    def _fill(self, number: int, site: str, metrics: Mapping[str, float | None] | None = None, **cells: Any) -> None:
        row = self._row(number, site)
        row.update(cells)
        for name, value in (metrics or {}).items():
            # an event that was read again has null where NaN was
            row[f"metric_{name}" if name in COLUMNS else name] = math.nan if value is None else value

    @staticmethod
    def _in_order(rows: dict[str, Row]) -> Iterator[Row]:
        for site, row in rows.items():
            if site != GLOBAL:
                yield row if row["round"] == 0 or "status" in row else {**row, "status": "missing"}
        if GLOBAL in rows:
            yield rows[GLOBAL]

    def _widen(self, columns: list[str]) -> None:
        """Rewrite the file with more columns. This is rare: a run's metrics appear in its first rounds."""
        fresh = self._path.with_suffix(".csv.new")
        with open(fresh, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            if self._columns:
                with open(self._path, encoding="utf-8", newline="") as old:
                    writer.writerows(csv.DictReader(old))
        os.replace(fresh, self._path)
        self._columns = columns


def write_matrix(folder: Path, matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Write the matrix of a cross-site evaluation.

    `cross_site.csv` has a row per model, site and metric; `cross_site.json` maps model to site to metrics.

    Args:
        folder: Folder to write to.
        matrix: Metrics by model, then by the site that scored it.
    """
    (folder / "cross_site.json").write_text(json.dumps(_plain(matrix), indent=1) + "\n", encoding="utf-8")
    with open(folder / "cross_site.csv", "w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["model", "site", "metric", "value"])
        for model, sites in matrix.items():
            for site, metrics in sites.items():
                rows.writerows([model, site, metric, value] for metric, value in metrics.items())


def event_line(event: Event) -> str:
    """Return an event as a line of events.jsonl."""
    fields = {"kind": event.kind, "time": event.time, "round": event.round, "site": event.site, "data": event.data}
    try:
        return json.dumps(fields, allow_nan=False, default=_plain) + "\n"
    except ValueError:  # NaN or infinity, which JSON does not have, become null
        return json.dumps(_plain(fields)) + "\n"


def _plain(value: Any) -> Any:
    """The value as JSON values: NaN and infinities become null, NumPy scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _past_events(path: Path) -> Iterator[Event]:
    """The events that an earlier server wrote. A last line that it did not finish is cut off."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        whole_bytes = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole_bytes += len(line)
            try:
                fields = json.loads(line)
            except ValueError:  # a machine that lost power may leave such a line
                continue
            yield Event(**fields)
        file.truncate(whole_bytes)
