"""Commands `fl-adapters job ...` and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.participant.kit import KIT_VARIABLE

job = typer.Typer(
    name="job",
    help="Submit, watch, end, resume and download the jobs of a federation; resume simulations.",
    epilog="\b\nExamples:\n  fl-adapters job submit tumour.yml --kit kits/lena --follow\n"
    "  fl-adapters job resume runs/train-1122-164503     a simulation",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

_Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")]
_Kit = Annotated[Path, typer.Option("--kit", envvar=KIT_VARIABLE, help="Folder of an admin's startup kit.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_PatienceS = Annotated[
    float | None, typer.Option(min=0, help="Seconds to wait for a server that does not answer. Default: the kit's.")
]

_Track = Annotated[
    list[str] | None,
    typer.Option(
        help="Track the job from this machine: mlflow:URI, wandb[:PROJECT] or tensorboard[:DIR]. "
        "Repeatable. Default: not tracked."
    ),
]


def _example(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  fl-adapters job {line}" for line in lines)


@job.command(epilog=_example("submit tumour.yml --kit kits/lena", "submit tumour.yml --kit kits/lena --follow"))
def submit(
    file: Annotated[Path, typer.Argument(metavar="JOB.yml", help="Job file.")],
    kit: _Kit,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Jobs with a higher one start first.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the job to its end.")] = False,
    track: _Track = None,
    as_json: _Json = False,
) -> None:
    """Put a job into the federation's queue. It starts when its sites have room.

    A job is tracked by this command, so it needs --follow.
    """
    from fl_adapters.cli.job import federation as command

    sys.exit(command.submit(kit, file, priority, follow, as_json, tuple(track or ())))


@job.command(name="list", epilog=_example("list --kit kits/lena", "list --kit kits/lena --before 217"))
def list_(
    kit: _Kit,
    before: Annotated[
        int | None,
        typer.Option(
            min=1, help="List older jobs that have ended; the list before says the number. Default: the newest."
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the jobs that wait or run, and those that ended last. With --before, older ones that have ended."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.list_jobs(kit, before, as_json))


@job.command(epilog=_example("show tumour-1122-164503 --kit kits/lena"))
def show(name: _Job, kit: _Kit, as_json: _Json = False) -> None:
    """Show a job's state, settings, rounds and result files."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.show(kit, name, as_json))


@job.command(
    epilog=_example(
        "follow tumour-1122-164503 --kit kits/lena",
        "follow tumour-1122-164503 --kit kits/lena --track mlflow:http://127.0.0.1:5000",
    )
)
def follow(name: _Job, kit: _Kit, patience_s: _PatienceS = None, track: _Track = None, as_json: _Json = False) -> None:
    """Follow a job to its end. Ctrl-C stops following; the job goes on.

    The exit status is 0 only if the job finished.
    """
    from fl_adapters.cli.job import federation as command

    sys.exit(command.follow(kit, name, patience_s, as_json, tuple(track or ())))


@job.command(
    epilog=_example("logs tumour-1122-164503 --kit kits/lena", "logs tumour-1122-164503 --kit kits/lena --follow")
)
def logs(
    name: _Job,
    kit: _Kit,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job has ended.")] = False,
    patience_s: _PatienceS = None,
    as_json: _Json = False,
) -> None:
    """Show the events of a job so far, one line each: time, site, round, and what happened.

    Among them are the lines of their own log that sites share (`share_logs` in their policy).
    """
    from fl_adapters.cli.job import federation as command

    sys.exit(command.logs(kit, name, patience_s, as_json, to_the_end=follow))


@job.command(epilog=_example("abort tumour-1122-164503 --kit kits/lena"))
def abort(name: _Job, kit: _Kit, as_json: _Json = False) -> None:
    """End a job that waits or runs. It can be resumed."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.change(kit, "AbortJob", name, as_json))


@job.command(
    epilog=_example("resume runs/train-1122-164503                  a simulation", "resume tumour-1122 --kit kits/lena")
)
def resume(
    which: Annotated[str, typer.Argument(metavar="JOB", help="Folder of a simulation, runs/JOB; with --kit, a name.")],
    kit: Annotated[
        Path | None, typer.Option("--kit", help="Folder of an admin's startup kit. Default: none, a simulation.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Continue a job that failed, was aborted or was killed, where it stopped. Acknowledged updates count.

    With --kit, a job of the federation goes back into the queue. Without, a simulation goes on: the sites' scripts
    start again, so run this command in the directory in which it was started. The exit status is then 0 only if every
    round finished.
    """
    if kit is not None:
        from fl_adapters.cli.job import federation

        sys.exit(federation.change(kit, "ResumeJob", which, as_json))
    from fl_adapters.cli import simulate as command

    sys.exit(command.resume(Path(which), as_json))


@job.command(epilog=_example("download tumour-1122-164503 --kit kits/lena --out results"))
def download(
    name: _Job,
    kit: _Kit,
    out: Annotated[Path | None, typer.Option(help="Folder for the files. Default: a folder named as the job.")] = None,
    patience_s: _PatienceS = None,
    as_json: _Json = False,
) -> None:
    """Download the result files of a job that has ended. A download that was interrupted goes on where it stopped."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.fetch(kit, name, out or Path(name), patience_s, as_json))


@job.command(epilog=_example("compare tumour-1122 tumour-1123 --kit kits/lena"))
def compare(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Names of the jobs.")],
    kit: _Kit,
    as_json: _Json = False,
) -> None:
    """Compare jobs: the settings in which they differ, their rounds, and the metrics of their best rounds."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.compare(kit, names, as_json))


@job.command(epilog=_example("delete tumour-1122-164503 --kit kits/lena"))
def delete(name: _Job, kit: _Kit, as_json: _Json = False) -> None:
    """Delete a job that has ended, with its results on the server."""
    from fl_adapters.cli.job import federation as command

    sys.exit(command.change(kit, "DeleteJob", name, as_json))
