"""The commands and their options. What they do is in modules of their own, imported when needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.cli import job_app
from fl_adapters.cli.federation import app as federation_app
from fl_adapters.cli.script_command import ScriptCommand
from fl_runtime.version import VERSION

app = typer.Typer(
    name="fl-adapters",
    help="Federated learning for training scripts that work.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: the examples keep their lines
)


def main() -> None:
    """What the `fl-adapters` command calls. Exits with status 0 on success, 1 on a failure, 2 on wrong usage."""
    app(prog_name="fl-adapters")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fl-adapters {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_Script = Annotated[
    str, typer.Argument(metavar="SCRIPT", help="The training script (with -m: the module). Left out: the job's app.")
]
_Args = Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the script.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


@app.command(
    cls=ScriptCommand,
    epilog="""\b
Examples:
  fl-adapters simulate train.py --sites 3 --rounds 5
  fl-adapters simulate train.py --lr 0.1 --sites 3        --lr goes to the script
  fl-adapters simulate train.py --sites 3 -- --name mine  --name goes to the script
  fl-adapters simulate -m package.train --job job.yml --json
  fl-adapters simulate train.py:step --sites 1000 --rounds 9 --engine processes    many sites, a few processes""",
)
def simulate(
    script: _Script = "",
    args: _Args = None,
    sites: Annotated[str | None, typer.Option(help="How many sites, or their names: a,b,c. Default: 3.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Without it the trainer's own budget decides.")] = None,
    strategy: Annotated[str | None, typer.Option(help="fedavg, or such as fedavg:weights=equal.")] = None,
    job: Annotated[Path | None, typer.Option(help="A job file (YAML); options given here win over it.")] = None,
    gpus: Annotated[str, typer.Option(help="Devices to deal out to the sites in turn: 0,1")] = "",
    every: Annotated[str | None, typer.Option(help='Between exchanges: "epoch", "2 epochs", or steps.')] = None,
    min_sites: Annotated[int | None, typer.Option(help="Updates a round needs. Default: every site's.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="A round's deadline. Default: a day.")] = None,
    optimizer_state: Annotated[str | None, typer.Option(help="keep, reset or average.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name. Default: from the script and the time.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the run's folder goes.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="The server's port; 0 takes a free one.", min=0, max=65535)] = 0,
    engine: Annotated[str | None, typer.Option(help="Virtual sites: processes, or ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="That carry out their work. Default: one per core.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")] = False,
    as_json: _Json = False,
) -> None:
    """Run SCRIPT once per site on this machine, federated; with --engine a function for each of many virtual sites.

    The options below are recognised anywhere before "--". Any other option after SCRIPT, and all that follows
    "--", goes to the script. Each site's output is in runs/JOB/sites/SITE/log.txt, the results are in runs/JOB.
    Ctrl-C ends all sites. Exit status 0 only if every round finished.
    """
    from fl_adapters.cli import simulate as command

    settings = {
        "sites": sites,
        "rounds": rounds,
        "strategy": strategy,
        "every": every,
        "min_sites": min_sites,
        "deadline_s": deadline_s,
        "optimizer_state": optimizer_state,
        "name": name,
    }
    wanted = command.SimulateOptions(
        app=script,
        job_file=job,
        settings={field: value for field, value in settings.items() if value is not None},
        args=tuple(args or ()),
        module=module,
        gpus=tuple(filter(None, gpus.split(","))),
        folder=folder,
        port=port,
        engine=engine,
        workers=workers,
    )
    sys.exit(command.run(wanted, as_json))


@app.command(
    epilog="""\b
Examples:
  fl-adapters doctor
  fl-adapters doctor --port 8765 --json
  fl-adapters doctor --kit kits/north"""
)
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs go.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Is this port free? 0: any.", min=0, max=65535)] = 0,
    kit: Annotated[Path | None, typer.Option(help="A startup kit to check: files, certificate, server, clock.")] = None,
    as_json: _Json = False,
) -> None:
    """Check versions, ports, disk and the startup kit, and say what to do about what is wrong.

    Exit status 1 if something is wrong that keeps a run from working.
    """
    from fl_adapters.cli.doctor import command

    sys.exit(command.run(folder, port, kit, as_json))


@app.command(
    epilog="""\b
Examples:
  fl-adapters privacy kits/hospital-a
  fl-adapters privacy runs/train-1122-164503 --delta 1e-6 --json"""
)
def privacy(
    folder: Annotated[
        Path | None, typer.Argument(help="A startup kit, or the folder of a run. Default: $FL_ADAPTERS_KIT.")
    ] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is stated.")] = 1e-5,
    as_json: _Json = False,
) -> None:
    """Show the privacy ledger: what left under differential privacy, and the epsilon it adds up to.

    Epsilon holds for whole updates of a site, in the adjacency of the filter that spent it (docs/filters.md). noise is
    relative to what one unit can change: the standard deviation of gaussian, the scale of laplace, the epsilon of pure.
    """
    from fl_adapters.cli import privacy as command

    sys.exit(command.run(folder, delta, as_json))


@app.command(
    name="ckks-key",
    epilog="""\b
Examples:
  fl-adapters ckks-key kits/hospital-a/ckks.key
  fl-adapters ckks-key ckks.key --job job.yml""",
)
def ckks_key(
    file: Annotated[Path, typer.Argument(help="Where to write it: ckks.key in a site's startup kit.")],
    job: Annotated[Path | None, typer.Option(help="A job file whose HomomorphicCKKS says the parameters.")] = None,
    as_json: _Json = False,
) -> None:
    """Make the key of HomomorphicCKKS, once, at one of the sites.

    Every site of the federation needs a copy as ckks.key in its startup kit; the server must never have one. Who has
    it can read every update. The fingerprint that is shown is of the public part and may be compared by telephone.
    """
    from fl_adapters.cli import ckks_key as command

    sys.exit(command.run(file, job, as_json))


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  fl-adapters bundle run spleen_ct_segmentation --kit kits/north --dataset_dir /data/spleen
  fl-adapters bundle run my_bundle training --epochs 20     alone: there is no startup kit
  fl-adapters bundle run my_bundle --federated_handler#every "2 epochs"
  fl-adapters simulate -m fl_adapters.monai run my_bundle --sites 4 --rounds 10""",
)
def bundle(
    arguments: Annotated[list[str], typer.Argument(metavar="run DIR [ARGUMENTS]", help="See `bundle run -- --help`.")],
) -> None:
    """Run a MONAI bundle, unmodified, as a participant of a federation.

    DIR is the bundle's folder. --kit names the startup kit, else $FL_ADAPTERS_KIT does; all other ARGUMENTS are those
    of `python -m monai.bundle run`: --id VALUE overrides a part of the bundle's configuration. In expressions
    @federated_site.name and .index tell this site from the others:

    --dataset_dir '$"data/" + @federated_site.name'
    """
    from fl_adapters.cli import bundle as command

    sys.exit(command.run(arguments))


federation_app.add_to(app)
app.add_typer(job_app.job)
