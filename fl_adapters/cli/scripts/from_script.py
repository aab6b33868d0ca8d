"""Command `fl-adapters new --from SCRIPT`: shows the lines that make a script a participant, and writes them."""

from __future__ import annotations

import difflib
import os
import shutil
import sys
from pathlib import Path

import typer
from rich.text import Text

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.scripts.joining import joined
from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import replacing

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def run(script: Path, yes: bool, as_json: bool) -> int:
    """Show what would be added to a script, and write it after a question. Returns exit status 0.

    Args:
        script: The script. It is read, and not run.
        yes: Write without a question.
        as_json: Print JSON as the last line; then nothing is asked.
    """
    with report_errors(as_json):
        before = _read(script)
        after = joined(before, str(script))
        lines = list(
            difflib.unified_diff(before.splitlines(), after.splitlines(), str(script), str(script), lineterm="")
        )
        console = console_for(as_json)
        for line in lines:
            style = "bold" if line.startswith(("+++", "---")) else _STYLES.get(line[:1], "")
            console.print(Text(line, style=style), soft_wrap=True)
        written = yes or (not as_json and _asked(script))
        if written:
            _write(script, after)
        told = f"wrote {script}" if written else f"{script} is as it was; --yes writes the lines"
        console.print(told, highlight=False, soft_wrap=True)
        console.print(f"next  fl-adapters doctor {script} && fl-adapters simulate {script} --sites 3", soft_wrap=True)
        if as_json:
            show_json({"script": str(script), "diff": "\n".join(lines), "written": written})
    return 0


def _asked(script: Path) -> bool:
    """Ask the user; the answer is no where nobody can be asked."""
    return sys.stdin.isatty() and typer.confirm(f"Write this to {script}?")


def _read(script: Path) -> str:
    try:
        return script.read_bytes().decode("utf-8")  # with its own ends of lines
    except OSError as error:
        raise ConfigError(f"cannot read {script}: {error.strerror}", where="--from", fix="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{script} is not UTF-8", where="--from", fix="save it as UTF-8") from None


def _write(script: Path, text: str) -> None:
    target = Path(os.path.realpath(script))  # a link stays one
    with replacing(target) as partial:
        partial.write_bytes(text.encode("utf-8"))
        shutil.copymode(target, partial)
