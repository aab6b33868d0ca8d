"""Trains with a script in three ways and shows the scores: each site alone, federated, and on all data in one place.

All trainings have the same settings and the same number of passes over their data. The examples' `demo.py` and `run.py`
use this module.
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

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # raised within peft

_AT_ONCE = 2  # trainings that run in parallel, each on its share of the cores


@dataclass(frozen=True)
class Trained:
    """One finished training.

    Attributes:
        name: "site-1 alone", "site-2 alone", ..., "federated" or "central".
        shard: Part of the data that it used, such as "2/3".
        folder: Folder with the saved model.
        log: Output of the script; of the federation, that at its first site.
    """

    name: str
    shard: str
    folder: Path
    log: Path


@dataclass(frozen=True)
class Score:
    """One row of the table of scores.

    Attributes:
        name: Name of the training, as in `Trained`.
        rows: Number of rows (or volumes) that it trained on.
        score: Score on the held-out rows; higher is better.
        folder: Folder with the saved model.
    """

    name: str
    rows: int
    score: float
    folder: Path


def train_three_ways(
    script: Path, *, sites: int, rounds: int, arguments: Sequence[str], console: Console
) -> tuple[Path, list[Trained]]:
    """Train with `script` alone and on all data, and with its `_federated` twin. A round is one epoch.

    The trainings without a federation are saved in `comparison/` within the run's folder. The program ends if a
    training fails.

    Args:
        script: The script without federation.
        sites: Number of sites.
        rounds: Number of rounds, and of epochs without a federation.
        arguments: Further arguments for the scripts.
        console: Console for progress.

    Returns:
        The folder of the federation's run, and the trainings: each site alone, "federated", "central".
    """
    console.rule(f"The federation: {rounds} rounds at {sites} sites")
    twin = script.with_stem(f"{script.stem}_federated")
    summary = _simulate(twin, sites, rounds, arguments)
    folder = Path(summary["folder"])

    console.rule("For comparison: the same training without a federation")
    alone = [_training(folder, f"site-{i} alone", f"{i}/{sites}") for i in range(1, sites + 1)]
    central = _training(folder, "central", "1/1")
    with ThreadPoolExecutor(_AT_ONCE) as pool, console.status("training ..."):
        longest_first = [central, *alone]
        for done in pool.map(lambda training: _train(script, training, rounds, arguments), longest_first):
            console.print(done, highlight=False)
    log = folder / "sites" / "site-1" / "log.txt"
    return folder, [*alone, Trained("federated", "1/1", Path(summary["model"]), log), central]


def shortfall(scores: Mapping[str, float]) -> str:
    """What the federation's score falls short of, as a message; "" if it keeps its promise.

    That is a score within 0.02 of central and above every site alone. Higher scores are better.
    """
    federated, central = scores["federated"], scores["central"]
    best = max((name for name in scores if name.endswith("alone")), key=lambda name: scores[name])
    if federated <= scores[best]:
        return f"the federation scores {federated:.3f}, not above {best} ({scores[best]:.3f}): give it more --rounds"
    if federated < central - 0.02:
        return (
            f"the federation scores {federated:.3f}, more than 0.02 below central ({central:.3f}): "
            "give it more --rounds"
        )
    return ""


def show(scores: Sequence[Score], title: str, metric: str, console: Console) -> None:
    """Print the scores and where the results are. Ends the program with status 1 if the federation scores too low."""
    run = next(score.folder for score in scores if score.name == "federated").parent
    table = Table(title=title, title_justify="left")
    table.add_column("training")
    table.add_column("rows", justify="right")
    table.add_column(metric, justify="right")
    table.add_column("saved in")
    for score in scores:
        style = "bold green" if score.name == "federated" else None
        saved = os.path.relpath(score.folder, run)
        table.add_row(score.name, f"{score.rows:,}", f"{score.score:.3f}", f"{saved}/", style=style)
    console.print(table)
    console.print(f"Results in {os.path.relpath(run)}, with these folders,", soft_wrap=True)
    console.print("report.html, history.csv, model/ and best/, and each site's output in sites/.")
    if short := shortfall({score.name: score.score for score in scores}):
        sys.exit(short)


def _simulate(script: Path, sites: int, rounds: int, arguments: Sequence[str]) -> dict[str, str]:
    """Run the federation with its live table on stderr. Returns the object that `--json` prints."""
    size = ["--sites", str(sites), "--rounds", str(rounds)]
    own = ["--epochs", str(rounds)]  # Keras cannot lengthen a fit; other frameworks ignore this
    command = [sys.executable, "-m", "fl_adapters", "simulate", str(script), *size, "--json", "--", *own, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    summary: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _training(folder: Path, name: str, shard: str) -> Trained:
    own = folder / "comparison" / name.replace(" ", "-")
    return Trained(name, shard, own, own / "log.txt")


def _train(script: Path, training: Trained, epochs: int, arguments: Sequence[str]) -> str:
    """Run the script on its part of the data. Returns a line with its duration."""
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
