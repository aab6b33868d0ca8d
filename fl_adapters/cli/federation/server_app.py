"""The options of `fl-adapters server`, `server backup` and `server restore`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.cli.output import report_errors
from fl_adapters.participant.kit import KIT_VARIABLE
from fl_runtime.transport.turns import LEAST_MEMORY_MIB, MEMORY_MIB
from fl_runtime.trust.files import STATE_VARIABLE

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Kit = Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of the server's startup kit.")]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar=STATE_VARIABLE,
        help="Folder for jobs and the server's state. Default: beside the kit, KIT-data.",
    ),
]

server = typer.Typer(
    name="server",
    help="""Run the server of a federation: one port, mutual TLS.

    SIGTERM and Ctrl-C stop it. Started again with the same data folder, it continues the jobs that were running.
    With --store, it waits until no other server of the store serves, and then goes on with its jobs.
    """,
    epilog="\b\nExamples:\n  fl-adapters server --kit kits/server\n"
    "  fl-adapters server --kit kits/server --data /var/lib/fl-adapters\n"
    "  fl-adapters server --kit kits/server --metrics 9464\n"
    "  fl-adapters server --kit kits/server --log-format json --log-file /var/log/fl-adapters.log\n"
    "  fl-adapters server --kit kits/server --track mlflow:http://127.0.0.1:5000\n"
    "  fl-adapters server --kit kits/server --job job.yml --json",
    invoke_without_command=True,
    rich_markup_mode=None,
    add_completion=False,
)


@server.callback()
def serve(
    context: typer.Context,
    kit: Annotated[
        Path | None,
        typer.Option(
            "--kit", envvar=KIT_VARIABLE, help="Folder of the server's startup kit. Default: $FL_ADAPTERS_KIT."
        ),
    ] = None,
    data: _Data = None,
    folder: Annotated[Path | None, typer.Option("--folder", hidden=True, help="Earlier name of --data.")] = None,
    listen: Annotated[str, typer.Option(help="Address to bind, as host:port. Default: the kit's.")] = "",
    job: Annotated[
        Path | None, typer.Option(help="Job file (YAML) to run, after which the server ends. Default: wait for jobs.")
    ] = None,
    syslog: Annotated[
        str,
        typer.Option(
            help="Syslog server for the audit log: udp://, tcp:// or tls://HOST:PORT. Default: the kit's, else none."
        ),
    ] = "",
    metrics: Annotated[
        str,
        typer.Option(
            help="Serve /healthz and /metrics over HTTP at HOST:PORT; PORT alone: at the loopback. Default: not at all."
        ),
    ] = "",
    store: Annotated[
        Path | None,
        typer.Option(
            help="File (YAML) with `database` and `tensors` that several servers share; one serves. Default: none."
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            help="Track all jobs from this server: mlflow:URI, wandb[:PROJECT] or tensorboard[:DIR]. Repeatable. "
            "Default: not tracked."
        ),
    ] = None,
    memory_mib: Annotated[
        int,
        typer.Option(
            help="Own memory of the server in MiB, beside the files that it maps. Large transfers take turns to stay "
            "below it.",
            min=LEAST_MEMORY_MIB,
        ),
    ] = MEMORY_MIB,
    log_format: Annotated[str, typer.Option(help="Form of the server's own lines: text or json.")] = "text",
    log_file: Annotated[Path | None, typer.Option(help="File for them, too, which is rotated. Default: none.")] = None,
    log_mb: Annotated[float, typer.Option(help="Size in MB from which the file is rotated.", min=0.001)] = 10.0,
    log_keep: Annotated[int, typer.Option(help="Number of older files to keep: FILE.1 is the newest.", min=1)] = 3,
    as_json: _Json = False,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if kit is None:
        raise typer.BadParameter("it is missing. Name the folder of the server's startup kit", param_hint="--kit")
    from fl_adapters.cli.federation import server as command
    from fl_adapters.cli.log_lines import LogOptions

    with report_errors(as_json):
        log = LogOptions.of(log_format, log_file, log_mb, log_keep)
    tracks = tuple(track or ())
    sys.exit(command.run(kit, data or folder, listen, job, syslog, metrics, as_json, store, log, tracks, memory_mib))


@server.command(epilog="\b\nExamples:\n  fl-adapters server backup /backups/monday --kit kits/server")
def backup(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make. It must not hold anything.")],
    kit: _Kit,
    data: _Data = None,
    as_json: _Json = False,
) -> None:
    """Copy the server's data folder, consistently while the server runs."""
    from fl_adapters.cli.federation import backup as command

    sys.exit(command.back_up(out, kit, data, as_json))


@server.command(epilog="\b\nExamples:\n  fl-adapters server restore /backups/monday --kit kits/server")
def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `server backup` has made.")],
    kit: _Kit,
    data: _Data = None,
    as_json: _Json = False,
) -> None:
    """Make a data folder from a backup, after comparing every file with its digest.

    The server that is started with it goes on where the backup stands. Sites that are ahead of it go back to its round.
    """
    from fl_adapters.cli.federation import backup as command

    sys.exit(command.restore(folder, kit, data, as_json))
