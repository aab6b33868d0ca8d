"""Settings of the documentation site: `make docs` builds it from these pages, offline."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from sphinx.application import Sphinx

from fl_adapters.cli.app import app as command_line
from fl_adapters.cli.pages.manual import commands
from fl_runtime.version import VERSION

project = "fl-adapters"
release = version = VERSION
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"fl-adapters {VERSION}"
html_show_sourcelink = html_show_copyright = False
smartquotes = False  # options begin with two hyphens
default_role = "code"  # docstrings have single backticks
exclude_patterns = ["pictures/make.py"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4
copybutton_prompt_text = r"(\w+\$|\$|>>>|\.\.\.) "
copybutton_prompt_is_regexp = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"

_ROOT = Path(__file__).resolve().parent.parent
_ANCHOR = re.compile(r'<a id="([^"]+)"></a>(`[^`]+`|\w[\w-]*)')
_NO_COLOURS = re.compile(r"^```(mermaid|haproxy)$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    """Let a page that GitHub shows fit the site.

    The README is a page of the site. Files outside of docs/ are named by their paths. Anchors within a line, and two
    kinds of listings, are written as Sphinx knows them.
    """
    folder = _ROOT if page == "readme" else _ROOT / "docs"
    text = (_ROOT / "README.md").read_text(encoding="utf-8") if page == "readme" else source[0]
    if page == "commands":
        found = commands(typer.main.get_command(command_line))
        text += "\n".join(f"\n## {command.name}\n\n```text\n{command.help}\n```\n" for command in found)
    text = _NO_COLOURS.sub("```text", _ANCHOR.sub(r"[\2]{#\1}", text))
    source[0] = _LINK.sub(lambda found: _inside(folder, found[1], found[2]), text)


def _inside(folder: Path, text: str, target: str) -> str:
    name, hash_, anchor = target.partition("#")
    path = (folder / name).resolve()
    if path == _ROOT / "README.md":
        return f"[{text}](readme.md{hash_}{anchor})"
    if path.is_relative_to(_ROOT / "docs"):
        return f"[{text}]({path.relative_to(_ROOT / 'docs').as_posix()}{hash_}{anchor})"
    shown = f"`{path.relative_to(_ROOT).as_posix()}`"
    return shown if text.strip("`") == shown.strip("`") else f"{text} ({shown})"


def _docstring(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Write the fences of Markdown that docstrings have as reStructuredText."""
    found, inside = list[str](), False
    for line in lines:
        fence = line.lstrip().startswith("```")
        if fence:
            inside = not inside
            found += [line.replace("```python", ".. code-block:: python"), ""] if inside else [""]
        else:
            found.append(f"    {line}" if inside else line)
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Connect the above to Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring, priority=1)  # before Google's style is read
