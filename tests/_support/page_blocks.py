"""Fenced blocks of the README and of all pages in docs/, and the commands that they show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: File name of the page.
        line: Number of the line with the opening fence.
        language: What follows the fence.
        text: The lines between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Page and line, as editors take it."""
        return f"{self.page}:{self.line}"

    @property
    def first(self) -> str:
        """The first line, which names the block in tables of tests."""
        return self.text.partition("\n")[0].strip()


def blocks(*languages: str) -> list[Block]:
    """Return all blocks in these languages, in the order of pages and lines."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(r"^```([\w{}-]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                found.append(Block(page.name, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def command_lines(block: Block) -> list[str]:
    """Return the commands of a block of a console: lines with a prompt, joined with those that continue them."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    found = (re.match(r"\w*\$ +(.*?)(?:\s+#\s.*)?$", line) for line in text.splitlines())
    return [match[1].strip() for match in found if match]
