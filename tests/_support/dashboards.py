"""A dashboard served by this process, requests to it, and a browser that reads it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from fl_adapters.dashboard.section import Section
from fl_adapters.dashboard.server import Dashboard

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 20_000


class Reader:
    """Requests as a browser makes them that has opened the dashboard's address."""

    def __init__(self, address: str) -> None:
        self.address = address
        parts = urlsplit(address)
        self.host, self.origin = parts.netloc, f"http://{parts.netloc}"
        self.cookie = ""
        status, headers, _ = self.ask(f"/?{parts.query}")
        assert status == 303
        self.cookie = headers["set-cookie"].partition(";")[0]

    def ask(
        self, path: str, method: str = "GET", fields: Mapping[str, str] | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and text of an answer. `fields` are those of a form."""
        sent = {"Host": self.host, "Cookie": self.cookie}
        if method != "GET":
            sent |= {"Origin": self.origin, "Content-Type": "application/x-www-form-urlencoded"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection(*urlsplit(self.origin).netloc.split(":"), timeout=20)
        try:
            connection.request(method, path, urlencode(fields or {}) if method != "GET" else None, sent)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read().decode()
        finally:
            connection.close()

    def page(self, path: str) -> str:
        """Return the text of a page that is there."""
        status, _, text = self.ask(path)
        assert status == 200, text
        return text


@contextmanager
def dashboard_of(*sections: Section) -> Iterator[Reader]:
    """Serve a dashboard on a free port until the block ends."""
    board, began = Dashboard(sections), threading.Event()
    server = threading.Thread(target=lambda: board.serve(began.set), daemon=True)
    server.start()
    assert began.wait(20), "the dashboard did not start"
    try:
        yield Reader(board.address)
    finally:
        board.stop()
        server.join(20)
        assert not server.is_alive(), "the dashboard did not end"


@contextmanager
def browser() -> Iterator[Any]:
    """Start a headless Chromium, or skip the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    try:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
    finally:
        playwright.stop()


@contextmanager
def opened(chromium: Any, reader: Reader, path: str, **context: Any) -> Iterator[Any]:
    """Open a page of the dashboard in a browser of its own. Whatever the page does wrong fails the test."""
    faults: list[str] = []
    within = chromium.new_context(**context)
    within.set_default_timeout(WAIT_MS)
    tab = within.new_page()
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    try:
        tab.goto(reader.address)
        tab.goto(reader.origin + path)
        yield tab
    finally:
        within.close()
    assert not faults, faults


def events_of(
    sites: int = 2, rounds: int = 3, metrics: int = 2, names: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Events of a run as a server writes them, round after round."""
    names = names or tuple(f"site-{number}" for number in range(1, sites + 1))
    told = SimpleNamespace(time=1e9)

    def event(kind: str, round: int = 0, site: str = "", **data: Any) -> dict[str, Any]:
        told.time += 0.5
        return {"time": told.time, "kind": kind, "round": round, "site": site, "data": data}

    yield event("started", rounds=rounds, sites=list(names))
    for number in range(1, rounds + 1):
        values = {"loss" if at == 0 else f"metric-{at}": at + 1 / number for at in range(metrics)}
        for name in names:
            yield event("update", number, name, status="used", seconds=1.0, num_examples=10, bytes_up=5, metrics={})
            yield event("report", number, name, metrics=values, num_examples=10)
        yield event("round_finished", number, seconds=2.0, metrics={})
        yield event("scored", number, metrics=values, best_round=number, best_metric="loss")
