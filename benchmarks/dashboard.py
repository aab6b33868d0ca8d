"""Measures the dashboard's page of a large run: its first paint, its updates, and the server's memory over an hour.

    python benchmarks/dashboard.py [--sites 50] [--rounds 200] [--metrics 10] [--passes 6] [--round-s 0]

The dashboard is a process of its own, and headless Chromium reads it. `first paint` is the time from a click on the
run's address, which the dashboard has not read before, to the first paint of its curves. An update is a round's events
appended to the file; its time ends when the page shows the round. Memory: the run is written from its beginning
`--passes` times, and the page is asked for after every fifth round. With `--round-s 3`, six passes take an hour.
Without it, the rounds follow each other at once.
Memory is resident memory of the dashboard's process; that of the first pass is the measure of the others.

Ends with status 1 if the first paint or an update takes a second, or if memory grows by more than 5 %. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

LIMIT_S = 1.0
ALLOWED = 1.05
PATIENCE_S = 60.0
UPDATES = 20
ROUNDS_EACH = 5
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Size:
    """Size of the run.

    Attributes:
        sites: Number of sites.
        rounds: Number of rounds.
        metrics: Number of metrics that each site reports on each round's model.
    """

    sites: int
    rounds: int
    metrics: int


def round_events(size: Size, number: int) -> str:
    """The lines of events.jsonl about one round, as the server writes them; round 0 is the start of the run."""
    events: list[dict[str, Any]] = []

    def add(kind: str, site: str = "", **data: Any) -> None:
        when = 1.7e9 + 3.0 * number
        events.append({"time": when, "kind": kind, "round": number, "site": site, "data": data})

    names = [f"site-{at}" for at in range(1, size.sites + 1)]
    if number == 0:
        add("started", rounds=size.rounds, sites=names)
    else:
        values = {"loss" if at == 0 else f"metric_{at}": at + 1 / number for at in range(size.metrics)}
        for at, name in enumerate(names):
            own = {key: value * (1 + at / 100) for key, value in values.items()}
            add("task_sent", name, task="train", bytes=4_000_000)
            counts = {"num_examples": 1000 + at, "local_steps": 30, "bytes_up": 4_000_000}
            add("update", name, status="used", seconds=2.5, metrics={"train_loss": own["loss"]}, **counts)
            add("report", name, metrics=own, num_examples=100)
        add("round_finished", seconds=3.0, metrics={"train_loss": values["loss"]})
        add("scored", metrics=values, best_round=number, best_metric="loss")
    return "".join(json.dumps(event) + "\n" for event in events)


class Run:
    """The file of events of a run that is being written."""

    def __init__(self, folder: Path, size: Size, rounds: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._size, self._next = folder / "events.jsonl", size, rounds + 1
        new = folder / "new"
        new.write_text("".join(round_events(size, number) for number in range(rounds + 1)))
        new.replace(self._path)

    def write_rounds(self, rounds: int = 1) -> int:
        """Append rounds, and return the number of the last one."""
        with self._path.open("a") as file:
            file.write("".join(round_events(self._size, self._next + at) for at in range(rounds)))
        self._next += rounds
        return self._next - 1


@contextmanager
def dashboard(runs: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start a dashboard; yields its address, and its process."""
    command = [sys.executable, "-m", "fl_adapters.cli", "dashboard", "--runs", str(runs), "--no-browser", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        process.stdout.close()


@contextmanager
def opened(browser: Browser, address: str, path: str) -> Iterator[Page]:
    """Open a page of the dashboard in a browser that knows its token."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(address)
        page.goto(origin(address) + path)
        page.locator("svg polyline").first.wait_for(state="attached")
        yield page
    finally:
        context.close()


def origin(address: str) -> str:
    """The dashboard's address without path and token."""
    return "http://" + urlsplit(address).netloc


def first_paint_s(browser: Browser, runs: Path, size: Size) -> float:
    """Seconds to the first paint of a page of a run that the dashboard has not read."""
    Run(runs / "whole", size, size.rounds)
    with dashboard(runs) as (address, _):
        with opened(browser, address, "/runs/run/whole") as page:
            page.wait_for_function(PAINT)
            return float(page.evaluate(PAINT)) / 1000


def update_seconds(browser: Browser, runs: Path, size: Size) -> list[float]:
    """Seconds from each of the last rounds' events to the page that shows the round."""
    run, taken = Run(runs / "live", size, size.rounds - UPDATES), []
    with dashboard(runs) as (address, _), opened(browser, address, "/runs/run/live") as page:
        shown = page.locator("#summary")
        for _ in range(UPDATES):
            page.wait_for_timeout(200)  # out of step with the dashboard's own looks
            began = time.perf_counter()
            number = run.write_rounds()
            shown.get_by_text(f"{number} of {size.rounds}", exact=True).wait_for()
            taken.append(time.perf_counter() - began)
    return taken


def memory_mib(runs: Path, size: Size, passes: int, round_s: float) -> list[float]:
    """Largest resident memory of the dashboard in each pass over the run's rounds."""
    largest = []
    with dashboard(runs) as (address, process):
        cookie, _ = answered(address, "/?" + urlsplit(address).query, {})
        headers = {"Cookie": str(cookie).partition(";")[0]}
        due = time.monotonic()
        for _ in range(passes):
            run, samples = Run(runs / "hour", size, 0), []
            for _ in range(size.rounds // ROUNDS_EACH):
                due += ROUNDS_EACH * round_s
                time.sleep(max(0.0, due - time.monotonic()))
                run.write_rounds(ROUNDS_EACH)
                answered(address, "/runs/run/hour", headers)
                samples.append(process.memory_info().rss / 2**20)
            largest.append(max(samples))
    return largest


def answered(address: str, path: str, headers: dict[str, str]) -> tuple[str | None, bytes]:
    """Ask the dashboard for a page over a connection of its own; returns the cookie that it sets, and the page."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE_S)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    page = answer.read()
    assert answer.status < 400, page
    connection.close()
    return answer.getheader("set-cookie"), page


def main() -> int:
    """Measure, and print one line for each result. Returns exit status 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--metrics", type=int, default=10)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--round-s", type=float, default=0.0)
    chosen = parser.parse_args()
    if CHROMIUM is None:
        parser.exit(2, "chromium is not installed\n")
    size = Size(chosen.sites, chosen.rounds, chosen.metrics)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs = Path(folder)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        paint = first_paint_s(browser, runs / "a", size)
        print(f"{size.sites} sites, {size.rounds} rounds, {size.metrics} metrics, {os.cpu_count()} cores")
        print(f"first paint     {paint:.2f} s", flush=True)
        updates = update_seconds(browser, runs / "b", size)
        print(f"updates         {statistics.median(updates):.2f} s, at most {max(updates):.2f} s", flush=True)
        browser.close()
        memory = memory_mib(runs / "c", size, chosen.passes, chosen.round_s)
    growth = memory[-1] / memory[0]
    print(f"memory          {', '.join(f'{mib:.0f}' for mib in memory)} MiB by pass: {growth - 1:+.1%}")
    return int(paint > LIMIT_S or max(updates) > LIMIT_S or growth > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
