"""Who may read the dashboard: nobody without its token, no page of another site, and nobody by another name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from dashboards import Reader, dashboard_of

from fl_adapters.dashboard.runs.section import RunsSection
from fl_adapters.dashboard.server import Dashboard
from fl_runtime.errors import ConfigError


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with dashboard_of(RunsSection(tmp_path_factory.mktemp("runs"))) as reader:
        yield reader


def test_the_address_with_the_token_opens_the_first_section_and_leaves_no_token_behind(reader: Reader) -> None:
    status, headers, _ = reader.ask(f"/runs?x=1&{urlsplit(reader.address).query}", Cookie="")
    assert (status, headers["location"]) == (303, "/runs?x=1")
    assert "HttpOnly" in headers["set-cookie"] and "samesite=strict" in headers["set-cookie"].lower()
    assert reader.ask("/")[1]["location"] == "/runs"
    assert "No runs in" in reader.page("/runs")


@pytest.mark.parametrize(
    "path", ["/", "/runs", "/runs?token=guess", "/static/live.js", "/changes?page=/runs", "/nothing"]
)
def test_without_the_token_nothing_is_told(reader: Reader, path: str) -> None:
    for cookie in ("", "x", reader.cookie[:-1], f"{reader.cookie}x", 'fl="'):
        status, _, text = reader.ask(path, Cookie=cookie)
        assert status == 403 and "fl-adapters dashboard" in text and "html" not in text


def test_another_name_for_this_machine_is_refused_even_with_the_cookie(reader: Reader) -> None:
    for host in ("evil.example", f"evil.example:{reader.host.rpartition(':')[2]}", "127.0.0.1", "", reader.host + "0"):
        assert reader.ask("/runs", Host=host)[0] == 403


def test_a_form_on_the_page_of_another_site_is_refused(reader: Reader) -> None:
    for origin in ("http://evil.example", "null", f"https://{reader.host}", ""):
        status, _, text = reader.ask("/runs", "POST", Origin=origin)
        assert status == 403 and "another page" in text
    assert reader.ask("/runs", "POST")[0] == 405


def test_pages_may_load_and_run_nothing_but_the_dashboards_own_files(reader: Reader) -> None:
    for path in ("/runs", "/nothing", "/static/live.js"):
        _, headers, _ = reader.ask(path)
        rules = headers["content-security-policy"]
        assert rules.startswith("default-src 'none'") and "script-src 'self'" in rules and "frame-ancestors" in rules
        assert "unsafe-inline" not in rules.replace("style-src-attr 'unsafe-inline'", "")
    assert "http://" not in reader.page("/runs") and "https://" not in reader.page("/runs")


def test_a_port_that_is_taken_is_named(reader: Reader) -> None:
    port = int(reader.host.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
        Dashboard([RunsSection(Path("runs"))], port)
