"""Measures the seconds to the same accuracy of FedBuff against FedAvg, with one slow site among four.

The sites train softmax regression on scikit-learn's digits, through the real runtime in one process. A step takes
`--step-s` seconds, and five times that at the slow site. The benchmark measures waiting, so its ratios hold for models
of any size.

    python benchmarks/fedbuff.py [--accuracy 0.85] [--step-s 0.05] [--runs 3]

Columns: median seconds to the accuracy, and how many times shorter than with FedAvg.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import fl_adapters as fl
from fl_adapters.testing import LocalFederation, Place

SITES, SLOWER, LOCAL_STEPS, RATE = 4, 5, 4, 0.5
STRATEGIES = {"fedavg": "fedavg:weights=equal", "fedbuff": "fedbuff:k=2"}

Array = np.ndarray[Any, np.dtype[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--accuracy",
        type=float,
        default=0.85,
        help="held-out accuracy that both must reach",
    )
    parser.add_argument("--step-s", type=float, default=0.05, help="seconds of a step at the fast sites")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    console = Console(stderr=True)
    times: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for number in range(args.runs):
        for name, spec in STRATEGIES.items():
            times[name].append(seconds(spec, args))
            console.print(f"run {number + 1}: {name} {times[name][-1]:.2f} s to {args.accuracy:.0%}", highlight=False)
    table = Table(title=f"{SITES} sites, one {SLOWER} x slower: to {args.accuracy:.0%} accuracy", title_justify="left")
    for column in ("strategy", "median, s", "against fedavg"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    base = statistics.median(times["fedavg"])
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.2f}", f"{base / median:.1f} x shorter")
    console.print(table)


def seconds(strategy: str, args: argparse.Namespace) -> float:
    """Seconds from the start of round 1 until a fast site receives a model with the wanted accuracy."""
    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(data))
    data, labels = (data[order] / 16).astype(np.float32), labels[order]
    held_out = data[:500], labels[:500]
    reached: list[float] = []
    began: list[float] = []

    def work(place: Place) -> None:
        mine = slice(500 + place.index, None, SITES)
        slow = SLOWER if place.index == SITES - 1 else 1
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros((65, 10), np.float32)}):
                began.append(time.monotonic())
                if place.index == 0 and not reached and accuracy(task.arrays["w"], *held_out) >= args.accuracy:
                    reached.append(time.monotonic())
                if reached:  # finish the remaining rounds without waiting
                    task.submit({"w": task.arrays["w"]}, num_examples=1, local_steps=1)
                    continue
                weights = task.arrays["w"].copy()
                for _ in range(LOCAL_STEPS):
                    weights -= RATE * gradient(weights, data[mine], labels[mine])
                    time.sleep(args.step_s * slow)
                task.submit({"w": weights}, num_examples=1, local_steps=LOCAL_STEPS)

    with LocalFederation(sites=SITES, rounds=args.rounds, strategy=strategy) as federation:
        federation.run(work, timeout_s=600)
    if not reached:
        raise SystemExit(f"{strategy} did not reach {args.accuracy:.0%} in {args.rounds} rounds; give more --rounds")
    return reached[0] - min(began)


def logits(weights: Array, data: Array) -> Array:
    """Scores [rows, classes] of a linear model. The last row of `weights` is its bias."""
    scores: Array = data @ weights[:-1] + weights[-1]
    return scores


def accuracy(weights: Array, data: Array, labels: Array) -> float:
    """Share of rows that are predicted correctly."""
    return float((logits(weights, data).argmax(axis=1) == labels).mean())


def gradient(weights: Array, data: Array, labels: Array) -> Array:
    """Gradient of the mean cross-entropy, in the shape of `weights`."""
    scores = logits(weights, data)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1
    return np.vstack([data.T @ shares, shares.sum(axis=0)]).astype(np.float32) / len(labels)


if __name__ == "__main__":
    main()
