"""Shows what a federation gains when its sites fine-tune a language model together.

python run.py                  # with transformers' Trainer
python run.py --trainer sft    # with trl's SFTTrainer

Prints the perplexity on held-out text of the base model, of each site training alone, of the federation, and of
training on all text in one place.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

from base import pretrained  # noqa: E402
from comparison import train_three_ways  # noqa: E402
from data import load  # noqa: E402
from evaluate import perplexity  # noqa: E402

SCRIPTS = {"trainer": "train.py", "sft": "train_sft.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=SCRIPTS, default="trainer")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, each a pass over the text (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="model of the hub, or a folder (default: a small one that is made here)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-2, help="default: %(default)s; for models of the hub try 2e-4"
    )
    args = parser.parse_args()
    console = Console()
    began = time.monotonic()
    text = load("1/1")
    with console.status("the base model ..."):
        base = args.model or pretrained(text.base, "runs")

    _, trained = train_three_ways(
        HERE / SCRIPTS[args.trainer],
        sites=args.sites,
        rounds=args.rounds,
        arguments=["--model", base, "--learning-rate", str(args.learning_rate), "--seed", str(args.seed)],
        console=console,
    )
    table = Table(title="Perplexity on the same held-out text (lower is better)", title_justify="left")
    for column in ("training", "perplexity", "adapter"):
        table.add_column(column, justify="right" if column == "perplexity" else "left")
    table.add_row("base model", f"{perplexity(base, None, text.test):.2f}", "")
    for one in trained:
        style = "bold green" if one.name == "federated" else None
        table.add_row(
            one.name, f"{perplexity(base, one.folder, text.test):.2f}", os.path.relpath(one.folder), style=style
        )
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s in total.")


if __name__ == "__main__":
    main()
