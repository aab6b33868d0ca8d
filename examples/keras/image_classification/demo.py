"""Four sites train together, and what that is worth: the accuracy of each site alone, of the federation, and of all
data in one place, on the same held-out rows, with the same settings and passes over the data.

python demo.py                   # Fashion-MNIST where it is found, else scikit-learn's digits
python demo.py --data digits

Ends with status 1 unless the federation is within two points of central and above every site alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data import ROWS, load

HERE = Path(__file__).resolve().parent
SITES = 4
ROUNDS = {"Fashion-MNIST": 15, "digits": 40}  # the digits are few
ACCURACY = re.compile(r"^accuracy on \d+ held-out rows: ([0-9.]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Score:
    """One line of the table. rows: trained on. accuracy: on the held-out rows, 0 to 1. model: its file."""

    name: str
    rows: int
    accuracy: float
    model: Path


def compare(source: str | None, rows: int, rounds: int, seed: int) -> Iterator[Score]:
    """The score of "federated", then of each site alone, then of "central", as they are done. Trains all of them."""
    given = ["--rows", str(rows), "--seed", str(seed), *(["--data", source] if source else [])]
    shares = [len(load(source, f"{i}/{SITES}", rows).train[0]) for i in range(1, SITES + 1)]
    run = federated([*given, "--epochs", str(rounds)], rounds)
    log = run / "sites" / "site-1" / "log.txt"
    yield Score("federated", sum(shares), accuracy_in(log), run / "model" / "model.keras")
    for i, share in enumerate(shares, start=1):
        yield alone(f"site-{i} alone", share, run, [*given, "--epochs", str(rounds), "--shard", f"{i}/{SITES}"])
    yield alone("central", sum(shares), run, [*given, "--epochs", str(rounds)])


def federated(arguments: list[str], rounds: int) -> Path:
    """Run the federation, with its live table on stderr; its folder."""
    size = ["--sites", str(SITES), "--rounds", str(rounds)]
    command = [sys.executable, "-m", "fl_adapters", "simulate", str(HERE / "train_federated.py"), *size, "--json"]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return Path(json.loads(done.stdout.splitlines()[-1])["folder"])


def alone(name: str, rows: int, run: Path, arguments: list[str]) -> Score:
    """Train without the federation, into a folder beside the run's results."""
    folder = run / "comparison" / name.replace(" ", "-")
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, str(HERE / "train.py"), *arguments, "--output", str(folder)]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        sys.exit(f"train.py failed for {name}, see {folder / 'log.txt'}")
    return Score(name, rows, accuracy_in(folder / "log.txt"), folder / "model.keras")


def accuracy_in(log: Path) -> float:
    """What the script has printed at its end."""
    return float(ACCURACY.findall(log.read_text("utf-8"))[-1])


def keeps_its_promise(scores: dict[str, float]) -> bool:
    """Within two points of central, and above every site alone."""
    sites = [score for name, score in scores.items() if name.endswith("alone")]
    return scores["federated"] > scores["central"] - 0.02 and scores["federated"] > max(sites)


def choose_backend() -> None:
    """Keras takes TensorFlow by default; take what is installed where nothing is said."""
    if not (Path.home() / ".keras" / "keras.json").exists():
        installed = [backend for backend in ("jax", "tensorflow", "torch") if find_spec(backend)]
        os.environ.setdefault("KERAS_BACKEND", installed[0] if installed else "tensorflow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's files, or: digits")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of all sites together, 0: all")
    parser.add_argument("--rounds", type=int, help="one pass over the data each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose_backend()
    began, data = time.monotonic(), load(args.data, None, args.rows)
    rounds = args.rounds or ROUNDS[data.name]
    print(f"{data.name}: {rounds} passes, accuracy on the same {len(data.test[0]):,} held-out rows", flush=True)
    scores = {}
    for score in compare(args.data, args.rows, rounds, args.seed):
        scores[score.name] = score.accuracy
        where = os.path.relpath(score.model)
        print(f"  {score.name:14} {score.rows:6,} rows  {score.accuracy:.4f}  {where}", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all.")
    if not keeps_its_promise(scores):
        sys.exit("the federation is not within two points of central, or not above every site alone")


if __name__ == "__main__":
    main()
