"""The commands about jobs, and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

job = typer.Typer(name="job", help="Jobs.", no_args_is_help=True, rich_markup_mode=None, add_completion=False)


@job.callback()
def _group() -> None:
    """Jobs."""


@job.command(epilog="\b\nExamples:\n  fl-adapters job resume runs/train-1122-164503")
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="runs/JOB of a simulation.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")] = False,
) -> None:
    """Go on with a simulation that ended with an error, or was killed, where it stopped.

    What the server had acknowledged counts. The sites' scripts are started again; run this in the directory in which
    the simulation was started. Exit status 0 only if every round finished.
    """
    from fl_adapters.cli import simulate as command

    sys.exit(command.resume(folder, as_json))
