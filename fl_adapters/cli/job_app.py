"""Commands `fl-adapters job ...` and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

job = typer.Typer(name="job", help="Resume jobs.", no_args_is_help=True, rich_markup_mode=None, add_completion=False)


@job.callback()
def _group() -> None:
    """Resume jobs that ended early."""


@job.command(epilog="\b\nExamples:\n  fl-adapters job resume runs/train-1122-164503")
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of a simulation: runs/JOB.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")] = False,
) -> None:
    """Continue a simulation that failed or was killed, where it stopped.

    Updates that the server had acknowledged count. The sites' scripts start again; run this command in the directory
    in which the simulation was started. The exit status is 0 only if every round finished.
    """
    from fl_adapters.cli import simulate as command

    sys.exit(command.resume(folder, as_json))
