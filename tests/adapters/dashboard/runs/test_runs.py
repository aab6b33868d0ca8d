"""The dashboard's pages about runs show what the files hold, and follow them; no text of a site does anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from dashboards import Reader, dashboard_of, events_of, opened
from promptness import PROMPT_S

from fl_adapters.dashboard.runs.folder import RunsFolder
from fl_adapters.dashboard.runs.section import RunsSection

HOSTILE = ('<img src=x onerror="alert(1)">', "</script><script>alert(2)</script>")


def write(folder: Path, events: Any, mode: str = "w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open(mode) as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "study", events_of(3, 4))
    write(folder / "study" / "2", events_of(3, 2))
    write(folder / "hostile", events_of(rounds=2, metrics=3, names=HOSTILE))
    write(
        folder / "failed",
        [
            *events_of(),
            {
                "time": 2e9,
                "kind": "failed",
                "round": 3,
                "site": "",
                "data": {"error": {"what": "too few sites are left"}},
            },
        ],
    )
    log = folder / "hostile" / "sites" / "north" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("x" * 140_000 + "\nepoch 2\n\x1b[31m</pre><script>alert(3)</script>\n")
    (folder / "not-a-run").mkdir()
    return folder


@pytest.fixture(scope="module")
def reader(runs: Path) -> Iterator[Reader]:
    with dashboard_of(RunsSection(runs)) as reader:
        yield reader


def test_the_list_has_every_run_with_its_state_rounds_and_best_metric(reader: Reader) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", reader.page("/runs"))
    told = {re.search(r'value="([^"]*)"', row)[1]: re.sub(r"<[^>]*>", " ", row).split() for row in rows[1:]}
    assert set(told) == {"study", "study/2", "hostile", "failed"}
    assert "4 of 4 loss 0.25 3" in " ".join(told["study"]) and "failed" in told["failed"] and "2" in told["study/2"]


def test_a_page_of_a_run_has_its_curves_sites_settings_and_report(reader: Reader) -> None:
    page = reader.page("/runs/run/study")
    assert page.count("<polyline") == 8 and "Not finished." in page  # two metrics of three sites and of all
    assert "Time and bytes" in reader.page("/runs/run/study?show=sites")
    assert reader.page("/runs/run/study/2").count("<h1>study/2</h1>") == 1
    status, headers, report = reader.ask("/runs/report/study")
    assert status == 200 and "script-src" not in headers["content-security-policy"] and "<svg" in report
    compared = reader.page("/runs/compare?run=study&run=failed")
    assert "Comparison of 2 runs" in compared and "failed" in compared


@pytest.mark.parametrize(
    "path",
    [
        "/runs/run/none", "/runs/run/../../etc", "/runs/run/%2e%2e%2f%2e%2e", "/runs/run/not-a-run", "/runs/run//etc",
        "/runs/run/study%00", "/runs/log/north/none", "/runs/log/..%2f/hostile", "/runs/log/south/hostile",
        "/runs/report/none", "/runs/compare?run=study", "/runs/compare?run=study&run=none", "/runs/other",
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_with_what_to_do(reader: Reader, path: str) -> None:
    status, _, text = reader.ask(path)
    assert status in (400, 404) and "What to do" in text and "Traceback" not in text


def test_the_trainings_of_a_script_lead_to_each_other(reader: Reader, runs: Path) -> None:
    def links(page: str) -> dict[str, str]:
        found = re.findall(r'<a href="([^"]+)"[^>]*>(Training \d+)<', page)
        return {name: address for address, name in found}

    first, second = reader.page("/runs/run/study"), reader.page("/runs/run/study/2")
    assert links(first) == {"Training 1": "/runs/run/study", "Training 2": "/runs/run/study/2"} == links(second)
    assert '<a href="/runs/run/study" aria-current="page">Training 1<' in first
    assert '<a href="/runs/run/study/2" aria-current="page">Training 2<' in second
    assert not links(reader.page("/runs/run/failed"))
    alone = RunsFolder(runs / "study")
    assert alone.trainings(".") == {1: ".", 2: "2"} == alone.trainings("2")


def test_the_output_of_a_site_is_paged_through_to_its_first_line(reader: Reader) -> None:
    newest = reader.page("/runs/log/north/hostile")
    assert "epoch 2" in newest and "<script>alert(3)" not in newest
    assert "xxx" not in newest, "its line is longer than a page"
    address, lengths = "/runs/log/north/hostile", list[int]()
    while older := re.search(r'href="([^"]+)">Older lines<', reader.page(address)):
        address = older[1]
        lengths.append(len("".join(re.findall(r"x{100,}", reader.page(address)))))
    assert len(lengths) == 2 and all(0 < length <= 4001 for length in lengths), "a line is cut, and what is shown of it"


def test_only_new_events_are_read_and_a_run_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    events = list(events_of(2, 5))
    folder = write(tmp_path / "runs" / "study", events[:9])
    runs = RunsFolder(tmp_path / "runs")
    before = runs.version("study")
    first = runs.record("study")
    assert sum(record.finished for record in first.rounds.values()) == 1
    with (folder / "events.jsonl").open("a") as file:
        line = json.dumps(events[9])
        file.write(line[:20])
        file.flush()
        assert runs.record("study") is first and runs.version("study") != before
        file.write(line[20:] + "\n")
    write(folder, events[10:], "a")
    record = runs.record("study")
    assert record is first and record.curve("loss") == [(float(n), 1 / n) for n in range(1, 6)]
    os.replace(write(tmp_path / "new", events[:9]) / "events.jsonl", folder / "events.jsonl")
    assert len(runs.record("study").curve("loss")) == 1


def test_a_run_does_not_grow_while_a_page_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(events_of(2, 5))
    folder = write(tmp_path / "runs" / "study", events[:9])

    def slow_sections(run: Any, titles: Any) -> Iterator[Any]:
        for _ in run.rounds:  # as every page does; fails if another thread adds a round
            if not others:
                write(folder, events[9:], "a")
                others.append(readers.submit(reader.ask, "/runs/run/study?show=settings"))
                wait(others, 0.5)  # what must not happen has to have time to
        return iter(())

    others: list[Future[Any]] = []
    monkeypatch.setattr("fl_adapters.dashboard.runs.section.run_sections", slow_sections)
    with dashboard_of(RunsSection(tmp_path / "runs")) as reader, ThreadPoolExecutor(1) as readers:
        assert "1 of 5" in reader.page("/runs/run/study")
        assert "5 of 5" in others[0].result()[2]


def test_the_list_offers_the_comparison_as_soon_as_there_are_runs(tmp_path: Path, chromium: Any) -> None:
    with dashboard_of(RunsSection(tmp_path / "runs")) as reader, opened(chromium, reader, "/runs") as tab:
        tab.get_by_text("No runs in").wait_for()
        write(tmp_path / "runs" / "one", events_of())
        write(tmp_path / "runs" / "two", events_of())
        tab.get_by_label("Compare one").check()
        tab.get_by_label("Compare two").check()
        tab.get_by_role("button", name="Compare the ticked runs").click()
        tab.get_by_role("heading", name="Comparison of 2 runs").wait_for()


def test_a_folder_that_is_not_there_yet_is_followed_too(tmp_path: Path) -> None:
    section = RunsSection(tmp_path / "runs")
    with dashboard_of(section) as reader:
        assert "No runs in" in reader.page("/runs")
        before = section.version("/runs")
        write(tmp_path / "runs" / "study", events_of())
        assert section.version("/runs") != before and "study" in reader.page("/runs")


def test_texts_of_sites_do_nothing_in_a_browser(reader: Reader, chromium: Any) -> None:
    with opened(chromium, reader, "/runs/run/hostile") as tab:
        for path in ("/runs/run/hostile?show=sites", "/runs/log/north/hostile", "/runs/compare?run=hostile&run=study"):
            tab.goto(reader.origin + path)
            assert tab.locator("main script, main img").count() == 0
        tab.goto(reader.origin + "/runs/log/north/hostile")
        shown = tab.locator("pre.log").inner_text()
        assert "epoch 2" in shown and "<script>alert(3)" in shown and "\x1b" not in shown and "xxx" not in shown


def test_an_event_shows_within_a_second_and_what_the_reader_has_opened_stays(tmp_path: Path, chromium: Any) -> None:
    events = list(events_of(3, 4, metrics=7))
    folder = write(tmp_path / "runs" / "study", events[:-8])
    with dashboard_of(RunsSection(tmp_path / "runs")) as reader, opened(chromium, reader, "/runs/run/study") as tab:
        tab.locator("summary").click()
        tab.locator("#summary[data-shown]").wait_for()  # it is connected
        tab.evaluate(
            """() => { new MutationObserver(() => { window.seen ??= performance.now() })
               .observe(document.querySelector('main'), {childList: true, subtree: true, characterData: true}) }"""
        )
        began = tab.evaluate("performance.now()")
        write(folder, events[-8:], "a")
        tab.locator("#summary", has_text="4 of 4").wait_for()
        assert tab.evaluate("window.seen") - began < 1_000 * PROMPT_S
        assert tab.locator("details[open] svg").count() == 3


def test_the_keyboard_reaches_everything_and_a_narrow_screen_has_all_of_it(reader: Reader, chromium: Any) -> None:
    with opened(chromium, reader, "/runs", viewport={"width": 400, "height": 800}) as tab:
        reached = []
        for _ in range(12):
            tab.keyboard.press("Tab")
            reached.append(tab.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel"))
        assert reached[:2] == ["Skip to the content", "Runs"]
        assert "Compare study" in reached and "study" in reached and "Compare the ticked runs" in reached
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        tab.get_by_label("Compare study", exact=True).check()
        tab.get_by_label("Compare failed").check()
        tab.get_by_role("button", name="Compare the ticked runs").click()
        assert tab.get_by_role("heading", level=1).inner_text() == "Comparison of 2 runs"
        for path in ("/runs/run/study", "/runs/run/study?show=sites", "/runs/log/north/hostile"):
            tab.goto(reader.origin + path)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 400, path
            assert tab.get_by_role("navigation", name="Dashboard").count() == 1 and tab.get_by_role("main").count() == 1
