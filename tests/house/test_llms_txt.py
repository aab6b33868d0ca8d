"""llms.txt has the format of llmstxt.org, lists every page of docs/, and all its links hold."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "llms.txt").read_text("utf-8")
LINKS = re.findall(r"^- \[.+?\]\((.+?)\): \S", TEXT, re.MULTILINE)


def test_title_and_summary_come_first_and_sections_are_lists_of_links() -> None:
    head, *sections = re.split(r"^## .+\n", TEXT, flags=re.MULTILINE)
    assert re.match(r"# fl-adapters\n\n> \S", head) and "\n#" not in head
    lines = [line for section in sections for line in section.splitlines() if line]
    assert len(lines) == len(LINKS), "each line of a section is `- [title](path): what it says`"


def test_every_page_is_listed_once_and_every_link_holds() -> None:
    assert [link for link in LINKS if not (ROOT / link).is_file()] == []
    assert len(LINKS) == len(set(LINKS))
    stubs = {"docs/readme.md"}  # the README as a page of the site
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages - stubs - set(LINKS) == set()
