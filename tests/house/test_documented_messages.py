"""What the docs say exists: messages of the code, classes of errors, and the pages and headings of links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fl_runtime import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ERRORS = {item.code: item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)}


@cache
def texts_of_the_code() -> str:
    """All string constants of the code, one a line; parts of f-strings apart."""
    files = [file for part in ("fl_runtime", "fl_adapters", "integrations") for file in (ROOT / part).rglob("*.py")]
    return "\n".join(text for file in files for text in _strings(ast.parse(file.read_text("utf-8"))))


def _strings(tree: ast.AST) -> Iterator[str]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def messages() -> list[str]:
    """The messages in the first column of the table under "What to do when"; `doctor` is none."""
    table = (ROOT / "docs" / "operations.md").read_text("utf-8").partition("## What to do when")[2]
    cells = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    return [text for cell in cells for text in re.findall(r"`([^`]{9,})`", cell)]


def test_the_page_lists_messages() -> None:
    assert len(messages()) > 25


@cache
def sections() -> dict[str, str]:
    """Heading -> text, of docs/troubleshooting.md."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def messages_of_errors() -> list[str]:
    return [text for code in ERRORS for text in re.findall(r"^\| `(.+?)`", sections().get(code, ""), re.MULTILINE)]


def test_every_error_has_a_section_that_names_its_class_and_a_message() -> None:
    assert set(sections()) - set(ERRORS) == {"Nothing happens"}
    for code, cls in ERRORS.items():
        if cls is not errors.FederationError:  # for a class of another version
            assert f"`{cls.__name__}`:" in sections()[code]
            assert re.search(r"^\| `", sections()[code], re.MULTILINE)


@pytest.mark.parametrize("message", dict.fromkeys([*messages(), *messages_of_errors()]))
def test_the_code_says_what_the_table_says(message: str) -> None:
    known = texts_of_the_code()
    for part in filter(None, (part.strip() for part in message.split("..."))):
        assert part in known, f"nothing in the code says {part!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page.name} links to {target}, where no such heading is"


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors of a page: GitHub's, of its headings, and those that it sets itself."""
    text = page.read_text("utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    made = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h).lower()).replace(" ", "-") for h in headings)
    return frozenset([*made, *re.findall(r'<a id="([^"]+)"', text)])
