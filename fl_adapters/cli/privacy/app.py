"""Commands `fl-adapters privacy ...` and their options. Each command's code is in its own module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fl_adapters.participant.kit import KIT_VARIABLE

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
_Delta = Annotated[float, typer.Option(help="Delta at which epsilon is stated, between 0 and 1.")]


class _ShowsByDefault(TyperGroup):
    """Group of commands in which `privacy KIT` stands for `privacy show KIT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # the shell completes the line
            return super().parse_args(ctx, args)
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["show", *args]
        return super().parse_args(ctx, args)


privacy = typer.Typer(
    name="privacy",
    cls=_ShowsByDefault,
    help="Plan the noise for a privacy budget, and show what has been spent and what has left a site.",
    epilog="""\b
Examples:
  fl-adapters privacy kits/hospital-a            what has been spent: short for `privacy show`
  fl-adapters privacy plan --epsilon 8 --delta 1e-5 --rounds 20
  fl-adapters privacy report kits/hospital-a     a page for the data protection officer""",
    rich_markup_mode=None,
    add_completion=False,
)


@privacy.command(
    epilog="""\b
Examples:
  fl-adapters privacy show kits/hospital-a
  fl-adapters privacy runs/train-1122-164503 --delta 1e-6 --json"""
)
def show(
    folder: Annotated[
        Path | None, typer.Argument(help="Startup kit, or folder of a run. Default: $FL_ADAPTERS_KIT.")
    ] = None,
    delta: _Delta = 1e-5,
    as_json: _Json = False,
) -> None:
    """Show the privacy ledger: what left a site under differential privacy, and the total epsilon.

    The column "protects" names what an epsilon is about: a site's whole update of a round, or a single record of its
    data. Epsilons of different kinds do not add up. The column noise is relative to what one unit can change: the
    standard deviation of gaussian, the scale of laplace, the epsilon of pure.
    """
    from fl_adapters.cli.privacy import ledger as command

    sys.exit(command.run(folder, delta, as_json))


@privacy.command(
    epilog="""\b
Examples:
  fl-adapters privacy plan --epsilon 8 --delta 1e-5 --rounds 20
  fl-adapters privacy plan --epsilon 8 --rounds 20 --sites 10 --fraction 0.3 --clip 0.5 --json
  fl-adapters privacy plan --job job.yml""",
)
def plan(
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of the job. Default: that of --job.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Number of rounds, at least 1. Default: that of --job.", min=1)
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Delta of the budget, between 0 and 1. Default: 1e-5.")] = None,
    sites: Annotated[
        int | None, typer.Option(help="Number of sites, at least 1. Default: that of --job, else 2.", min=1)
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the sites in a round. Default: 1.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The job's seed, which draws the sites of a round. Default: that of --job, else 0."),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest L2 norm of an update. Default: 1.")] = None,
    adjacency: Annotated[
        str | None, typer.Option(help="What an update is exchanged for: replace or zero. Default: replace.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="Where the noise is added: site_out or server_in. Default: site_out.")
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(help="Job file with a filter GaussianDP. The options above replace what it says. Default: none."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show how much noise a privacy budget takes, before anything is trained.

    The table has the noise for these rounds, and for fewer and more of them. The noise multiplier is the standard
    deviation of the noise divided by `clip`. Epsilon protects a site's whole update of a round.
    """
    from fl_adapters.cli.privacy import plan as command

    filter_fields = {"epsilon": epsilon, "delta": delta, "clip": clip, "adjacency": adjacency, "at": at}
    job_fields = {"rounds": rounds, "sites": sites, "fraction": fraction, "seed": seed}
    sys.exit(command.run(job, filter_fields, job_fields, as_json))


@privacy.command(
    epilog="""\b
Examples:
  fl-adapters privacy report kits/hospital-a
  fl-adapters privacy report kits/hospital-a --job tumour-2 --out reports --json"""
)
def report(
    kit: Annotated[Path, typer.Argument(envvar=KIT_VARIABLE, help="Startup kit of a site.")],
    delta: _Delta = 1e-5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for privacy-report.html and privacy-report.txt. Default: the kit.")
    ] = None,
    job: Annotated[str, typer.Option(help="Report on this job alone. Default: all.")] = "",
    as_json: _Json = False,
) -> None:
    """Make a page for the data protection officer: what has left a site, when, and to whom.

    It lists tensors, numbers, bytes, metrics, the filters in force, the epsilon spent, and what was refused, from the
    site's audit log and privacy ledger. The exit status is 1 if lines of the log were edited, removed or moved.
    """
    from fl_adapters.cli.privacy import report as command

    sys.exit(command.run(kit, delta, out, job, as_json))
