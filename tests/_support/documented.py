"""Pages of the documentation as tests run them: their commands, their files, and what they show on the screen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        machine: Before the prompt: "north" for "north$ ...", "" for "$ ...".
        line: The command without its comment.
    """

    machine: str
    line: str


class Page:
    """A page of docs/, by its headings.

    Args:
        name: File name, such as "production.md".
    """

    def __init__(self, name: str) -> None:
        self._text = (ROOT / "docs" / name).read_text("utf-8")

    def headings(self) -> list[str]:
        """Return the headings that have commands of fl-adapters directly under them."""
        found = re.findall(r"^##+ (.*)$", self._text, re.MULTILINE)
        return [heading for heading in found if self.commands(heading)]

    def commands(self, heading: str) -> list[Command]:
        """Return the commands under a heading, but those that install packages."""
        found = (re.match(r"(\w*)\$ (.*?)(?:\s{2,}#.*)?$", line) for line in self._console_lines(heading))
        return [Command(item[1], item[2]) for item in found if item and not item[2].startswith("pip ")]

    def screens(self, heading: str) -> list[str]:
        """Return the lines of output that are shown under a heading."""
        shown = [line for line in self._console_lines(heading) if not re.match(r"\w*\$ ", line)]
        return shown + [line for block in self._blocks(heading, "text") for line in block.splitlines()]

    def files(self, heading: str) -> dict[str, str]:
        """Return the files under a heading: those whose first line is a comment with their name."""
        blocks = self._blocks(heading, "yaml|python")
        return {found[1]: block for block in blocks if (found := re.match(r"# (\S+)$", block.partition("\n")[0]))}

    def _console_lines(self, heading: str) -> list[str]:
        return [line for block in self._blocks(heading, "console") for line in block.splitlines()]

    def _blocks(self, heading: str, language: str) -> list[str]:
        section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", self._text, re.MULTILINE | re.DOTALL)
        assert section, f"no heading {heading!r}"
        return [found[1] for found in re.finditer(rf"^```(?:{language})\n(.*?)^```", section[1], re.M | re.S)]


def in_general(text: str) -> str:
    """Return a line of output without what differs from run to run: numbers, addresses, folders, fingerprints."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "FINGERPRINT", text)
    text = re.sub(r"(fl\.example\.org|127\.0\.0\.1):\d+", "ADDRESS", text)
    text = re.sub(r"(?<![\w.])/\S*?(?=kits/|north/jobs/)", "FOLDER/", text)
    text = re.sub(r"(?<=tfevents).*", "", text)
    return re.sub(r"\s+", " ", re.sub(r"[\d.]*\d", "N", text))
