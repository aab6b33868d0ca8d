"""The documentation site is built from the pages in docs/ and the README, without a warning and without network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="Sphinx, which builds the site, is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_every_page_is_in_the_site_and_links_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path / "site")]
    done = subprocess.run([*command, "-d", str(tmp_path / "read")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    loaded = r'<(?:script|link|img)[^>]*(?:src|href)="https?://'
    assert [page for page in pages if re.search(loaded, (tmp_path / "site" / f"{page}.html").read_text("utf-8"))] == []
    commands = (tmp_path / "site" / "commands.html").read_text("utf-8")
    assert "fl-adapters job submit" in commands and "--best-metric" in commands
