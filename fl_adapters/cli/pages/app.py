"""Commands that write and serve pages, and their options. Each command's code is in its own module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command, examples in _COMMANDS:
        app.command(epilog=f"\b\nExamples:\n{examples}")(command)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run's folder.")] = None,
    as_json: _Json = False,
) -> None:
    """Write the report of a run: curves, time and bytes, sites, filters and settings, in one HTML file.

    Every run ends with such a report. This command makes it again, or shows where a run stands that has not ended.
    """
    from fl_adapters.cli.pages import report as command

    sys.exit(command.report(folder, out, as_json))


def dashboard(
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder with the folders of runs.")] = Path("runs"),
    kit: Annotated[
        Path | None,
        typer.Option(
            help="Startup kit: an admin's, to follow the federation; a site's, for its own jobs. Default: none."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The site daemon's --state, for a site's --kit. Default: the kit."),
    ] = None,
    project: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of kits and their authority, to make and hand out kits. Default: none."
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File with the passphrase of the authority's key, for --project. Default: a prompt."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    as_json: _Json = False,
) -> None:
    """Follow runs in the browser: live curves, sites, output, and runs side by side.

    With an admin's kit, follow a federation: its queue, jobs, sites and audit log, with what the admin's role may do.

    The pages are served to this machine alone, at an address that holds a secret. They need no network.
    """
    from fl_adapters.cli.pages import dashboard as command

    sys.exit(command.dashboard(runs, kit, state, project, passphrase_file, port, browser, as_json))


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of the runs.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("comparison.html"),
    as_json: _Json = False,
) -> None:
    """Compare runs: the settings that differ, the metrics of the best rounds, and a page with their curves.

    Runs that differ in nothing but the job's seed are one curve with a band of one standard deviation.
    """
    from fl_adapters.cli.pages import report as command

    sys.exit(command.compare(folders, out, as_json))


def manual(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of manual pages. Default: beside this command.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write a page for `man` of every command, such as fl-adapters-simulate(1), from this help.

    By default they lie in share/man beside the folder of `fl-adapters` itself, where `man` finds them if the command is
    on the path.
    """
    from fl_adapters.cli.pages import manual as command

    sys.exit(command.run(context.find_root().command, out, as_json))


_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (
        report,
        "  fl-adapters report runs/train-1202-101500\n"
        "  fl-adapters report runs/train-1202-101500 --out train.html --json",
    ),
    (
        dashboard,
        "  fl-adapters dashboard\n"
        "  fl-adapters dashboard --runs experiments/runs --port 8899 --no-browser\n"
        "  fl-adapters dashboard --kit kits/ada      the federation, as this admin may see it\n"
        "  fl-adapters dashboard --kit kits/north    the jobs of this site\n"
        "  fl-adapters dashboard --project kits      participants, kits and certificates",
    ),
    (
        compare,
        "  fl-adapters compare runs/fedavg runs/fedprox\n  fl-adapters compare runs/seed-* --out seeds.html --json",
    ),
    (
        manual,
        "  fl-adapters manual                            then: man fl-adapters\n"
        "  fl-adapters manual --out ~/.local/share/man",
    ),
)
