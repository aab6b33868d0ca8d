"""Command line `fl-adapters`: the commands for one machine and their options. Each command's code is in its own module.

Modules of commands are imported when a command runs, so that `--help` stays fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fl_adapters.cli.federation import app as federation_app
from fl_adapters.cli.job import app as job_app
from fl_adapters.cli.pages import app as pages_app
from fl_adapters.cli.privacy import app as privacy_app
from fl_adapters.cli.scripts.script_command import ScriptCommand
from fl_adapters.cli.site import app as site_app
from fl_runtime.version import VERSION

app = typer.Typer(
    name="fl-adapters",
    help="""Turn training scripts that already work into participants in a federation.

    Each command tells more with --help. Tab completes commands and options after --install-completion, and
    `fl-adapters manual` writes these pages for `man`.
    """,
    epilog="""\b
Examples:
  fl-adapters new torch tumour                            a script to begin with
  fl-adapters simulate train.py --sites 3 --rounds 5      a federation on this machine
  fl-adapters run --kit kits/north -- python train.py     a site of a real one
  fl-adapters doctor""",
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help keeps the lines of the examples
)


def main() -> None:
    """Entry point of the command `fl-adapters`. Exits with status 0 on success, 1 on failure and 2 on wrong usage."""
    app(prog_name="fl-adapters")


def _show_version(requested: bool) -> None:
    if requested:
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
    str, typer.Argument(metavar="SCRIPT", help="Training script; with -m, a module. Default: the app of --job.")
]
_Args = Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the script.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


@app.command(
    cls=ScriptCommand,
    epilog="""\b
Examples:
  fl-adapters simulate train.py --sites 3 --rounds 5
  fl-adapters simulate train.py --data north=a.csv,south=b.csv    a file for each site: fl_adapters.site().data
  fl-adapters simulate train.py --data 'parts/{site}.csv'
  fl-adapters simulate train.py --lr 0.1 --sites 3        --lr goes to the script
  fl-adapters simulate train.py --sites 3 -- --name mine  --name goes to the script
  fl-adapters simulate train.py --best-metric accuracy --best-mode max
  fl-adapters simulate -m package.train --job job.yml --json
  fl-adapters simulate train.py --track mlflow:http://127.0.0.1:5000
  fl-adapters simulate train.py:step --sites 1000 --rounds 9 --engine processes    many sites, few processes""",
)
def simulate(
    script: _Script = "",
    args: _Args = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Number of sites, or their names: north,south. Default: the job's, those of --data, else 3."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Where each site's data lie: north=a.csv,south=b.csv, or 'parts/{site}.csv'. Scripts read it as "
            "fl_adapters.site().data. Default: no site has data of its own."
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Number of rounds. Default: the job's, else as many as the trainer's own budget.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Strategy and its options, such as fedprox:mu=0.1. Default: fedavg."),
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(help="Job file (YAML). Options on the command line replace its fields. Default: none."),
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="CUDA devices for the sites in turn: 0,1. Default: the scripts choose.")
    ] = "",
    every: Annotated[
        str | None,
        typer.Option(
            help='Training between exchanges: "epoch", "2 epochs", or a number of optimizer steps. Default: epoch.'
        ),
    ] = None,
    min_sites: Annotated[
        int | None, typer.Option(help="Number of updates that a round needs. Default: one from every site.")
    ] = None,
    deadline_s: Annotated[
        float | None, typer.Option(help="Seconds after which a round closes without late sites. Default: a day.")
    ] = None,
    optimizer_state: Annotated[
        str | None,
        typer.Option(help="Optimizer state after new weights arrive: keep, reset or average. Default: keep."),
    ] = None,
    secure_sum: Annotated[
        bool, typer.Option("--secure-sum", help="Mask the updates: the server learns their sum alone.")
    ] = False,
    best_metric: Annotated[
        str | None,
        typer.Option(
            help="Metric that decides which round is the best, by its name in history.csv. Default: the script's, "
            "else loss."
        ),
    ] = None,
    best_mode: Annotated[
        str | None, typer.Option(help="Whether lower (min) or higher (max) values of it are better. Default: min.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job and of its folder. Default: from the script and the time.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder that the run's own folder is made in.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="TCP port of the server; 0 takes a free one.", min=0, max=65535)] = 0,
    engine: Annotated[
        str | None, typer.Option(help="Simulate virtual sites with: processes, or ray. Default: a process per site.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of workers for virtual sites. Default: one per core.")
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            help="Track the run: mlflow:URI, wandb[:PROJECT], tensorboard[:DIR]. Repeatable. Default: not tracked."
        ),
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")] = False,
    as_json: _Json = False,
) -> None:
    """Run a training script as a federation on this machine, once per site.

    With --engine, SCRIPT names a function (train.py:step) that a few workers call for each of many virtual sites.

    The options below may stand anywhere before "--". Any other option after SCRIPT, and all that follows "--", goes
    to the script. The output of each site is in runs/JOB/sites/SITE/log.txt, the results are in runs/JOB. Ctrl-C ends
    all sites. The exit status is 0 only if every round finished.
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
        "secure_sum": secure_sum or None,
        "best_metric": best_metric,
        "best_mode": best_mode,
        "name": name,
        "track": tuple(track) if track else None,
    }
    options = command.SimulateOptions(
        app=script,
        job_file=job,
        settings={field: value for field, value in settings.items() if value is not None},
        args=tuple(args or ()),
        module=module,
        gpus=tuple(filter(None, gpus.split(","))),
        data=tuple(data or ()),
        folder=folder,
        port=port,
        engine=engine,
        workers=workers,
    )
    sys.exit(command.run(options, as_json))


@app.command(
    epilog="""\b
Examples:
  fl-adapters evaluate 'predictions/{site}.csv' --truth sick --prediction model --sites north,south
  fl-adapters evaluate '{site}.csv' --truth y --prediction old --prediction new --group sex --smallest-cell 10
  fl-adapters evaluate '{site}.csv' --truth days --prediction days_new --task regression --json"""
)
def evaluate(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="CSV file of each site; {site} stands for the name of the site.")
    ],
    truth: Annotated[str, typer.Option(help="Column of the true values.")],
    prediction: Annotated[list[str], typer.Option(help="Column of a model's predictions. May be given several times.")],
    group: Annotated[list[str] | None, typer.Option(help="Column of subgroups. Repeatable. Default: none.")] = None,
    sites: Annotated[str, typer.Option(help="Number of sites, or their names: north,south.")] = "3",
    task: Annotated[str, typer.Option(help="classification or regression.")] = "classification",
    scores: Annotated[
        str, typer.Option(help="What scores are: probability, or decision for any size.")
    ] = "probability",
    positive: Annotated[str | None, typer.Option(help="The positive one of two classes. Default: the last.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Score from which on it is predicted. Default: 0.5.")] = None,
    smallest_cell: Annotated[
        int, typer.Option(help="Fewest rows behind any number of a subgroup that leaves a site.", min=1)
    ] = 1,
    bins: Annotated[int, typer.Option(help="Bins of the reliability table.", min=1, max=1000)] = 10,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder. Default: made of the time.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder that the run's own folder is made in.")] = Path("runs"),
    as_json: _Json = False,
) -> None:
    """Score predictions of given models at all sites together, without training, on this machine.

    Each site's rows are in a CSV file of its own: a column of true values, a column for each model, columns of
    subgroups. A model's column holds probabilities or scores, or predicted labels as texts or whole numbers. The scores
    are those of all rows in one place. They are printed, and left in runs/JOB/evaluation.json.

    In a federation, `python -m fl_adapters.evaluation FILE ...` does the same at each site (docs/evaluation.md).
    """
    from fl_adapters.cli.pages import evaluation as command

    options = {
        "--truth": [truth],
        "--prediction": prediction,
        "--group": group or [],
        "--task": [task],
        "--scores": [scores],
        "--positive": [] if positive is None else [positive],
        "--threshold": [] if threshold is None else [str(threshold)],
        "--smallest-cell": [str(smallest_cell)],
        "--bins": [str(bins)],
    }
    script = [file, *(f"{option}={value}" for option, values in options.items() for value in values)]
    job = command.job_fields(sites, name)
    sys.exit(command.evaluate(job, script, folder, as_json))


@app.command(
    epilog="""\b
Examples:
  fl-adapters new torch tumour
  fl-adapters new hf sentiment --json
  fl-adapters new --from train.py       shows the lines to add to a script of yours, and asks""",
)
def new(
    framework: Annotated[
        str, typer.Argument(metavar="FRAMEWORK", help="hf, lightning, keras, monai, xgboost, torch or sklearn.")
    ] = "",
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder for the files. Made if it does not exist.")
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option("--from", help="A script that trains, which gets the lines. It is not run. Default: none."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --from: write without asking.")] = False,
    as_json: _Json = False,
) -> None:
    """Begin with a script that runs alone and federated: train.py, job.yml, README.md and test_train.py in DIR.

    The script makes up its data, so it runs as it is; put your own data and model in. No file is replaced. With --from,
    begin with a script of yours: the lines that make it a participant are shown as a diff, and written if you say so.
    """
    if script is not None:
        from fl_adapters.cli.scripts import from_script

        sys.exit(from_script.run(script, yes, as_json))
    from fl_adapters.cli.scripts import new as command

    sys.exit(command.run(framework, folder, as_json))


pages_app.add_to(app)


@app.command(
    epilog="""\b
Examples:
  fl-adapters doctor
  fl-adapters doctor --port 8765 --json
  fl-adapters doctor --kit kits/north
  fl-adapters doctor train.py    what in a script would not work in a federation"""
)
def doctor(
    script: Annotated[
        Path | None, typer.Argument(metavar="SCRIPT", help="Training script to read instead. It is not run.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for runs, to check its disk.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="TCP port to check; 0 checks none.", min=0, max=65535)] = 0,
    kit: Annotated[
        Path | None, typer.Option(help="Startup kit to check: its files, certificate, server and clock. Default: none.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Check this machine and a startup kit, or a training script, and say how to fix what is wrong.

    Checks versions, ports, disk and limits; with --kit also the certificate, the way to the server and its clock. The
    exit status is 1 if a problem keeps runs from working.
    """
    from fl_adapters.cli.doctor import command

    sys.exit(command.run(folder, port, kit, as_json, script))


@app.command(
    name="ckks-key",
    epilog="""\b
Examples:
  fl-adapters ckks-key kits/hospital-a/ckks.key
  fl-adapters ckks-key ckks.key --job job.yml""",
)
def ckks_key(
    file: Annotated[Path, typer.Argument(help="File to write: ckks.key in a site's startup kit.")],
    job: Annotated[
        Path | None,
        typer.Option(help="Job file whose filter HomomorphicCKKS gives parameters. Default: those of the filter."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make the sites' common key for encrypted averages (HomomorphicCKKS). Do this once, at one site.

    Every site needs a copy as ckks.key in its startup kit. The server must never have one: whoever has it can read
    every update. The fingerprint shown is that of the public part; sites may compare it by telephone.
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
    arguments: Annotated[
        list[str], typer.Argument(metavar="run DIR [ARGUMENTS]", help="See `fl-adapters bundle run -- --help`.")
    ],
) -> None:
    """Run an unmodified MONAI bundle as a participant of a federation.

    DIR is the bundle's folder. --kit names the startup kit; without it, $FL_ADAPTERS_KIT does. All other ARGUMENTS are
    those of `python -m monai.bundle run`: --id VALUE replaces a part of the bundle's configuration. Expressions may use
    the name and index of this site:

    --dataset_dir '$"data/" + @federated_site.name'
    """
    from fl_adapters.cli.scripts import bundle as command

    sys.exit(command.run(arguments))


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
    short_help="Describe tables or images over all sites: counts, quantiles, histograms.",
)
def stats(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="FILE_OR_FUNCTION [ARGUMENTS]", help="See `fl-adapters stats --help`.")
    ] = None,
) -> None:
    """Describe tables or images over all sites. Its options are those of `python -m fl_adapters.statistics`."""
    from fl_adapters.cli.pages import stats as command

    sys.exit(command.run(arguments or ()))


federation_app.add_to(app)
app.add_typer(job_app.job)
app.add_typer(site_app.site)
app.add_typer(privacy_app.privacy)
