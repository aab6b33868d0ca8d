"""Command line for statistics: `fl-adapters stats`, and `python -m fl_adapters.statistics` as a job's script."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_adapters import Job, Simulation, site
from fl_adapters.environments.starting.site_data import parse_data, parse_sites
from fl_adapters.participant.kit import KIT_VARIABLE, current_kit
from fl_adapters.participant.outputs import own_folder
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.files import write_file

from .federated import BINS, QUANTILES, describe
from .images import describe_images
from .page import page
from .result import Statistics
from .screen import show
from .sources import open_images, open_source
from .totals import Alone

_DOCUMENT, _PAGE = "statistics.json", "statistics.html"
_MOST_EDGES = 100_000
_EXAMPLES = """\
examples:
  fl-adapters stats patients.csv                                  one file
  fl-adapters stats --data north=a.csv,south=b.csv                a site for each file, simulated
  fl-adapters stats --data 'parts/{site}.csv'                     the same, with the names of the files
  fl-adapters stats load.py:table --sites 3                       what a function returns at each site, simulated
  fl-adapters stats --images scans/                               a folder of images: sizes, spacings, intensities
  fl-adapters stats statistics.json --html page.html              a page of an earlier result
  fl-adapters run --kit kits/north -- fl-adapters stats           a site of a federation: `data` of its policy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Its arguments. Default: those of the process.

    Returns:
        The exit status.
    """
    args = command_parser().parse_args(arguments)
    try:
        if args.kit is not None:
            os.environ[KIT_VARIABLE] = args.kit
        found, files = _found(args)
        if args.html is not None:
            write_file(args.html, page(found).encode())
            files = {**files, "page": args.html}
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps({"error": error.to_wire()}), flush=True)
        return 1
    show(found, files, sys.stderr if args.json else sys.stdout)
    if args.json:
        print(found.to_json(indent=None), flush=True)
    return 0


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fl-adapters stats",
        description="Describe tables or images over all sites: counts, means, quantiles, histograms, correlations.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="FILE_OR_FUNCTION",
        help="CSV, TSV, Parquet or Feather file; script.py:function or "
        "module:function, which returns a data frame or an iterable of some; or a statistics.json, to show it again",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar="PATHS",
        help="simulate sites with data of their own: north=a.csv,south=b.csv, or 'parts/{site}.csv'. Default: none",
    )
    add("--sites", help="simulate sites of the one source: their number, or names such as north,south. Default: none")
    add("--features", type=_list, metavar="NAMES", help="columns, separated by commas. Default: all")
    add(
        "--categorical",
        type=_list,
        default=(),
        metavar="NAMES",
        help="columns of numbers that hold categories. Default: none",
    )
    add(
        "--bins",
        type=_bins,
        default=BINS,
        help=f"number of bins of the histograms, or edges such as 0,18,65,120. Default: {BINS}",
    )
    add(
        "--quantiles",
        type=_numbers,
        default=QUANTILES,
        metavar="LEVELS",
        help=f"their levels. Default: {','.join(map(str, QUANTILES))}",
    )
    add("--images", action="store_true", help="the source is a folder of images, or a pattern such as 'scans/*.png'")
    add(
        "--intensities",
        type=_edges,
        metavar="EDGES",
        help="with --images: edges of the bins of all pixels, such as 0,64,128 or FIRST:LAST:WIDTH. Default: 0:256:8",
    )
    add("--no-correlations", dest="correlations", action="store_false", help="leave correlations out")
    add("--smallest-count", type=int, default=1, metavar="N", help="least number of rows behind any number. Default: 1")
    add("--secure-sum", action="store_true", help="simulate with masks, so that the server sees the totals alone")
    add("--kit", help="startup kit of this site. Default: $FL_ADAPTERS_KIT")
    add("--folder", default="runs", help="folder for simulations. Default: runs")
    add("--html", type=Path, metavar="FILE", help="write a page of the result to this file. Default: none")
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    return parser


def _found(args: argparse.Namespace) -> tuple[Statistics, Mapping[str, Path]]:
    """The result, and the files that hold it."""
    _check_options(args)
    kit = current_kit()
    if kit is None and (args.data or args.sites):
        return _simulated(args)
    if args.secure_sum:
        raise ConfigError(
            "--secure-sum is about simulated sites, and there are none",
            where="stats",
            fix="add --data or --sites; in a federation the job says secure_sum: true",
        )
    source = args.source or site().data
    if not source:
        raise ConfigError("there is nothing to describe", where="stats", fix="name a file or a function; see --help")
    if kit is None and source.endswith(".json"):
        return Statistics.from_json(_text_of(Path(source))), {}
    found = _described(source, args, Alone(site()) if kit is None else None)
    return (found, {}) if kit is None else (found, _written(found, own_folder(kit, site().job)))


def _described(source: str, args: argparse.Namespace, alone: Alone | None) -> Statistics:
    common: Any = {
        "bins": args.bins,
        "quantiles": args.quantiles,
        "smallest_count": args.smallest_count,
        "federation": alone,
    }
    if args.images:
        edges = {} if args.intensities is None else {"intensities": args.intensities}
        return describe_images(open_images(source), **edges, **common)
    return describe(
        open_source(source, args.categorical),
        features=args.features,
        categorical=args.categorical,
        correlations=args.correlations,
        **common,
    )


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options of tables for images, and those of images for tables."""
    given = {
        "--features": args.features is not None,
        "--categorical": bool(args.categorical),
        "--no-correlations": not args.correlations,
        "a list of edges for --bins": not isinstance(args.bins, int),
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if args.images and wrong:
        fix = "leave it out; --intensities has the edges for pixels, and --bins is a number"
        raise ConfigError(f"{wrong[0]} is about tables, not about --images", where="stats", fix=fix)
    if args.intensities is not None and not args.images:
        raise ConfigError("--intensities is about images", where="stats", fix="add --images, or leave it out")


def _simulated(args: argparse.Namespace) -> tuple[Statistics, Mapping[str, Path]]:
    own: list[Any] = [args.source] if args.source else []
    own += [f"--features={','.join(args.features)}"] if args.features is not None else []
    own += [f"--categorical={','.join(args.categorical)}"] if args.categorical else []
    own += [f"--bins={args.bins if isinstance(args.bins, int) else _joined(args.bins)}"]
    own += [f"--quantiles={_joined(args.quantiles)}", f"--smallest-count={args.smallest_count}"]
    own += [] if args.correlations else ["--no-correlations"]
    own += ["--images"] if args.images else []
    own += [f"--intensities={_joined(args.intensities)}"] if args.intensities is not None else []
    data, sites = parse_data(args.data), parse_sites(args.sites) if args.sites else None
    if not args.source and data is None:
        raise ConfigError("there is nothing to describe", where="stats", fix="name a function such as load.py:table")
    simulation = Simulation(sites=sites, data=data, args=own, module=True, folder=args.folder, quiet=True)
    result = Job(app="fl_adapters.statistics", secure_sum=args.secure_sum).run(simulation)
    written = sorted((result.folder / "sites").glob(f"*/{_DOCUMENT}"))
    if not written:
        raise ConfigError("no site has written a result", where=str(result.folder), fix="see the logs of its sites")
    files = {"result": result.folder / _DOCUMENT, "page": result.folder / _PAGE}
    for file in files.values():
        shutil.copyfile(written[0].with_name(file.name), file)
    return Statistics.from_json(_text_of(files["result"])), files


def _written(found: Statistics, folder: Path) -> Mapping[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"result": folder / _DOCUMENT, "page": folder / _PAGE}
    write_file(files["result"], found.to_json().encode())
    write_file(files["page"], page(found).encode())
    return files


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", where="stats", fix="check the path") from None


def _list(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _bins(text: str) -> int | tuple[float, ...]:
    return int(text) if text.isdigit() else _numbers(text)


def _edges(text: str) -> tuple[float, ...]:
    if ":" not in text:
        return _numbers(text)
    try:
        first, last, width = map(float, text.split(":"))
        count = round((last - first) / width)
    except (ValueError, ZeroDivisionError, OverflowError):
        count = 0
    if not 0 < count <= _MOST_EDGES or not math.isclose(first + count * width, last, abs_tol=1e-9 * abs(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST:WIDTH, with LAST a whole number of bins above")
    return tuple(first + number * width for number in range(count + 1))


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(map(repr, numbers))


if __name__ == "__main__":
    sys.exit(main())
