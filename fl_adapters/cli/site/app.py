"""Commands `fl-adapters site ...` and their options. Each command's code is in its own module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.cli.output import report_errors
from fl_adapters.participant.kit import KIT_VARIABLE

site = typer.Typer(
    name="site",
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
)

_Kit = Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of the site's startup kit.")]
_State = Annotated[
    Path | None,
    typer.Option("--state", help="Folder for jobs, logs, results and what else changes. Default: the kit."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job.")]


@site.callback(
    epilog="\b\nExamples:\n"
    "  fl-adapters site --kit kits/north\n"
    "  fl-adapters site --kit kits/north --state /var/lib/fl-adapters/north\n"
    "  fl-adapters site --kit kits/north --metrics 9465\n"
    "  fl-adapters site approve tumour-3 --kit kits/north\n"
    "  fl-adapters site check job.yml --kit kits/north"
)
def daemon(
    context: typer.Context,
    kit: Annotated[
        Path | None,
        typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of the site's startup kit. Default: $FL_ADAPTERS_KIT."),
    ] = None,
    state: _State = None,
    restarts: Annotated[int, typer.Option(help="Times that a script that has died is started again.", min=0)] = 3,
    grace_s: Annotated[float, typer.Option(help="Seconds that scripts have to save at SIGTERM.", min=0)] = 30.0,
    log_format: Annotated[str, typer.Option(help="Form of the daemon's own lines: text or json.")] = "text",
    log_file: Annotated[Path | None, typer.Option(help="File for them, too, which is rotated. Default: none.")] = None,
    log_mb: Annotated[float, typer.Option(help="Size in MB from which the file is rotated.", min=0.001)] = 10.0,
    log_keep: Annotated[int, typer.Option(help="Number of older files to keep: FILE.1 is the newest.", min=1)] = 3,
    metrics: Annotated[
        str,
        typer.Option(
            help="Serve /healthz and /metrics over HTTP at HOST:PORT; PORT alone: at the loopback. Default: not at all."
        ),
    ] = "",
    as_json: _Json = False,
) -> None:
    """Run every job that includes this site, as the site's policy allows, until SIGTERM or Ctrl-C.

    The policy's `apps` names the command for each job's app, `resources` how many run at a time and on which GPUs. The
    output of a job's script is in STATE/jobs/JOB/log.txt, its results are beside it. A script that dies is started
    again; when the daemon is stopped and started again, its jobs go on.
    """
    if context.invoked_subcommand is not None:
        return
    if kit is None:
        raise typer.BadParameter("give --kit, the folder of the site's startup kit", param_hint="--kit")
    from fl_adapters.cli.log_lines import LogOptions
    from fl_adapters.cli.site import command_line

    with report_errors(as_json):
        log = LogOptions.of(log_format, log_file, log_mb, log_keep)
    sys.exit(command_line.run(kit, state, restarts, grace_s, log, metrics, as_json))


@site.command(epilog="\b\nExamples:\n  fl-adapters site approve tumour-3 --kit kits/north")
def approve(job: _Job, kit: _Kit, state: _State = None, as_json: _Json = False) -> None:
    """Let a job run that waits for approval (`approve: ask` in the policy).

    Shows who submitted it, its app, strategy and rounds, what would travel, filters and partners. The approval holds
    for these settings alone.
    """
    from fl_adapters.cli.site import decide as command

    sys.exit(command.run(kit, state, job, as_json, approved=True))


@site.command(epilog='\b\nExamples:\n  fl-adapters site refuse tumour-3 --kit kits/north --reason "no ethics vote yet"')
def refuse(
    job: _Job,
    kit: _Kit,
    state: _State = None,
    reason: Annotated[
        str, typer.Option(help="Why; the server and the other sites can read it. Default: no reason.")
    ] = "",
    as_json: _Json = False,
) -> None:
    """Refuse a job that waits for approval. The server is told at once."""
    from fl_adapters.cli.site import decide as command

    sys.exit(command.run(kit, state, job, as_json, approved=False, reason=reason))


@site.command(
    epilog="\b\nExamples:\n"
    "  fl-adapters site check job.yml --kit kits/north\n"
    '  fl-adapters site check job.yml --kit kits/north --submitter "lead lena of north-hospital" --json'
)
def check(
    job: Annotated[Path, typer.Argument(metavar="JOB.yml", help="Job file.")],
    kit: _Kit,
    submitter: Annotated[
        str, typer.Option(help='Who would submit it, as "ROLE NAME of ORGANISATION". Default: not checked.')
    ] = "",
    as_json: _Json = False,
) -> None:
    """Show what a job would run at this site, and every rule that would refuse it. Nothing is run.

    The exit status is 1 if a rule refuses it.
    """
    from fl_adapters.cli.site import check as command

    sys.exit(command.run(kit, job, submitter, as_json))
