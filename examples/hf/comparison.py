"""Runs a training script three ways: at each site alone, federated, and on all data in one place.

All with the same settings and the same number of passes over their data. Used by the examples' own demo.py and run.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft, of its own

_AT_ONCE = 2  # trainings that run side by side, each on its share of the cores


@dataclass(frozen=True)
class Trained:
    """name: "site-1 alone", ..., "federated", "central". shard: of the data, like "2/3". adapter: its folder."""

    name: str
    shard: str
    adapter: Path


def train_three_ways(
    script: Path, *, sites: int, rounds: int, arguments: Sequence[str], console: Console
) -> tuple[Path, list[Trained]]:
    """Train with `script` alone and central, and with its `_federated` twin; a round is an epoch.

    Returns the folder of the federation's run, and the results in the order of `Trained.name` above. The adapters
    trained for comparison are in `comparison` within that folder. Ends the program where a training fails.
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
    return folder, [*alone, Trained("federated", "1/1", Path(summary["model"])), central]


def _simulate(script: Path, sites: int, rounds: int, arguments: Sequence[str]) -> dict[str, str]:
    """Run the federation; its live table shows on stderr. Returns what `--json` prints."""
    size = ["--sites", str(sites), "--rounds", str(rounds)]
    command = [sys.executable, "-m", "fl_adapters", "simulate", str(script), *size, "--json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    summary: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _training(folder: Path, name: str, shard: str) -> Trained:
    return Trained(name, shard, folder / "comparison" / name.replace(" ", "-"))


def _train(script: Path, training: Trained, epochs: int, arguments: Sequence[str]) -> str:
    """Run the script on its part of the data. Returns a line that says how long it took."""
    began = time.monotonic()
    training.adapter.mkdir(parents=True)
    own = ["--shard", training.shard, "--epochs", str(epochs), "--output", str(training.adapter)]
    threads = max(1, (os.cpu_count() or 1) // _AT_ONCE)
    log = training.adapter / "log.txt"
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(script), *own, *arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status != 0:
        raise SystemExit(f"{script.name} failed for {training.name}, see {log}")
    return f"{training.name}: {time.monotonic() - began:.0f} s"
