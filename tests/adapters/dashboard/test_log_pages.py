"""Pages of logs: every line once, in both directions, whatever the log holds, and no more than a page is read."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from fl_adapters.dashboard.log_pages import LogPage, log_version, read_page

MANY = "".join(f"line {number}\n" for number in range(3000)).encode()
LONG = b"x" * 300_000
CASES = {
    "nothing": [b""],
    "no file": [b"a\nb\n", b""],
    "many lines": [MANY],
    "several files": [MANY, b"", MANY[:500], b"end"],
    "a line without end": [b"first\n" + LONG],
    "a long line among others": [b"first\n" + LONG + b"\nlast\n"],
    "not text": [bytes(range(256)) * 2000],
}


def backwards(files: list[Path]) -> list[LogPage]:
    pages = [read_page(files)]
    while pages[-1].begin:
        pages.append(read_page(files, before=pages[-1].begin))
    return pages[::-1]


def forwards(files: list[Path]) -> list[LogPage]:
    pages = [read_page(files, after=0)]
    while pages[-1].end < pages[-1].size:
        pages.append(read_page(files, after=pages[-1].end))
    return pages


@pytest.mark.parametrize("case", CASES)
def test_the_pages_of_a_log_are_the_whole_log(tmp_path: Path, case: str) -> None:
    files = [tmp_path / str(number) for number in range(len(CASES[case]))]
    for path, data in zip(files, CASES[case], strict=True):
        path.write_bytes(data)
    size = sum(map(len, CASES[case]))
    for pages in (backwards(files), forwards(files)):
        assert (pages[0].begin, pages[-1].end, pages[0].size) == (0, size, size)
        assert all(page.end == following.begin for page, following in pairwise(pages))
        assert all(len(page.lines) <= 500 and page.end - page.begin <= 2**17 for page in pages)
    if max(map(len, b"".join(CASES[case]).split(b"\n"))) < 1000 and "not text" not in case:
        whole = b"".join(CASES[case]).decode().splitlines()
        for pages in (backwards(files), forwards(files)):
            assert [line for page in pages for line in page.lines] == whole


def test_a_page_of_a_large_log_costs_no_more_memory_than_one_of_a_small_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        file.truncate(2**32)  # a sparse file of 4 GiB
        file.seek(2**31)
        file.write(MANY)
    tracemalloc.start()
    try:
        assert "line 2999" in read_page([log], before=2**31 + len(MANY)).lines
        assert read_page([log]).end == 2**32
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_places_outside_of_a_log_are_its_ends(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("one\ntwo\n")
    assert read_page([log], before=10**15).lines == ("one", "two")
    assert read_page([log], after=10**15).lines == ()
    assert read_page([tmp_path / "missing"]).size == 0


def test_the_newest_page_changes_with_the_log_and_others_stay(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("one\n")
    newest, older = log_version("/x", [log]), log_version("/x?before=3", [log])
    log.write_text("one\ntwo\n")
    assert log_version("/x", [log]) != newest
    assert log_version("/x?before=3", [log]) == older
