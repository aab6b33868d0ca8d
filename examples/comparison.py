"""Runs a training script three ways: at each site alone, federated, and on all data in one place; shows the scores.

All with the same settings and the same number of passes over their data. Used by the examples' own demo.py and run.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft, of its own

_AT_ONCE = 2  # trainings that run side by side, each on its share of the cores


@dataclass(frozen=True)
class Trained:
    """name: "site-1 alone", ..., "federated", "central". shard: of the data, like "2/3". folder: what it saved.
    log: what the script printed, of the federation at its first site."""

    name: str
    shard: str
    folder: Path
    log: Path


@dataclass(frozen=True)
class Score:
    """One line of the table. name, folder: as above. rows: or volumes, trained on. score: on those held out."""

    name: str
    rows: int
    score: float
    folder: Path


def train_three_ways(
    script: Path, *, sites: int, rounds: int, arguments: Sequence[str], console: Console
) -> tuple[Path, list[Trained]]:
    """Train with `script` alone and central, and with its `_federated` twin; a round is an epoch.

    Returns the folder of the federation's run, and the results in the order of `Trained.name` above. What was trained
    for comparison is in `comparison` within that folder. Ends the program where a training fails.
    """
    console.rule(f"The federation: {rounds} rounds at {sites} sites")
    twin = script.with_stem(f"{script.stem}_federated")
    summary = _simulate(twin, sites, rounds, arguments)
    folder = Path(summary["folder"])

    console.rule("For comparison: the same training without the federation")
    alone = [_training(folder, f"site-{i} alone", f"{i}/{sites}") for i in range(1, sites + 1)]
    central = _training(folder, "central", "1/1")
    with ThreadPoolExecutor(_AT_ONCE) as pool, console.status("training ..."):
        longest_first = [central, *alone]
        for done in pool.map(lambda training: _train(script, training, rounds, arguments), longest_first):
            console.print(done, highlight=False)
    log = folder / "sites" / "site-1" / "log.txt"
    return folder, [*alone, Trained("federated", "1/1", Path(summary["model"]), log), central]


def keeps_its_promise(scores: Mapping[str, float]) -> bool:
    """Name -> score, where more is better: the federation within two points of central, and above every site alone."""
    sites = [score for name, score in scores.items() if name.endswith("alone")]
    return scores["federated"] >= scores["central"] - 0.02 and scores["federated"] > max(sites)


def show(scores: Sequence[Score], title: str, metric: str, console: Console) -> None:
    """Print the table, where the results lie, and whether the federation was worth it; if not, end with status 1."""
    table = Table(title=title, title_justify="left")
    table.add_column("trained")
    table.add_column("on", justify="right")
    table.add_column(metric, justify="right")
    table.add_column("result")
    for score in scores:
        style = "bold green" if score.name == "federated" else None
        table.add_row(score.name, f"{score.rows:,}", f"{score.score:.3f}", os.path.relpath(score.folder), style=style)
    console.print(table)
    run = next(score.folder for score in scores if score.name == "federated").parent
    console.print(f"Results in {os.path.relpath(run)}: model/, best/, history.csv, a log per site.", soft_wrap=True)
    if not keeps_its_promise({score.name: score.score for score in scores}):
        sys.exit("the federation is not within two points of central, or not above every site alone")


def _simulate(script: Path, sites: int, rounds: int, arguments: Sequence[str]) -> dict[str, str]:
    """Run the federation; its live table shows on stderr. Returns what `--json` prints."""
    size = ["--sites", str(sites), "--rounds", str(rounds)]
    own = ["--epochs", str(rounds)]  # Keras cannot lengthen a fit; the others run the federation's rounds anyway
    command = [sys.executable, "-m", "fl_adapters", "simulate", str(script), *size, "--json", *own, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    summary: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _training(folder: Path, name: str, shard: str) -> Trained:
    own = folder / "comparison" / name.replace(" ", "-")
    return Trained(name, shard, own, own / "log.txt")


def _train(script: Path, training: Trained, epochs: int, arguments: Sequence[str]) -> str:
    """Run the script on its part of the data. Returns a line that says how long it took."""
    began = time.monotonic()
    training.folder.mkdir(parents=True)
    own = ["--shard", training.shard, "--epochs", str(epochs), "--output", str(training.folder)]
    threads = max(1, (os.cpu_count() or 1) // _AT_ONCE)
    with training.log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(script), *own, *arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status != 0:
        raise SystemExit(f"{script.name} failed for {training.name}, see {training.log}")
    return f"{training.name}: {time.monotonic() - began:.0f} s"
