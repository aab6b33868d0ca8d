"""Measures a boosting round in histogram mode, tunnelled through the server, against XGBoost's own collective.

XGBoost's collective (rabit) connects the sites directly on the loopback. Sites are processes, and the data is random.
The two run in turn.

    python benchmarks/xgboost_tunnel.py [--sites 3 5] [--depth 6] [--rounds 20] [--rows 5000] [--columns 20]

Columns: number of sites; median seconds of a boosting round through the server and with plain rabit; round trips in a
boosting round; milliseconds that the server adds to a round trip; KiB that a site sends in a boosting round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import xgboost
from rich.console import Console
from rich.table import Table
from xgboost import collective
from xgboost.tracker import RabitTracker

from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train

PARAMS = {"objective": "binary:logistic", "tree_method": "hist", "nthread": 1, "base_score": 0.5}


def data(index: int, rows: int, columns: int) -> tuple[Any, Any]:
    draw = np.random.default_rng(index)
    x = draw.normal(size=(rows, columns)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).astype(int)


def tunnelled(index: int, kit: str, args: Any, answers: Any) -> None:
    """Run one site through the server. Durations begin after the first round, which starts the workers."""
    times: list[float] = []

    class Clock(xgboost.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            times.append(time.perf_counter())
            return False

    matrix = xgboost.DMatrix(*data(index, args.rows, args.columns))
    params = {**PARAMS, "max_depth": args.depth}
    train(params, matrix, args.rounds, mode="histogram", kit=kit, callbacks=[Clock()])
    answers.put((index, float(np.median(np.diff(times)))))


def plain(index: int, arguments: dict[str, Any], args: Any, answers: Any) -> None:
    """Run one site with plain rabit."""
    with collective.CommunicatorContext(**arguments, dmlc_task_id=str(index)):
        matrix = xgboost.QuantileDMatrix(*data(index, args.rows, args.columns))
        booster = xgboost.Booster({**PARAMS, "max_depth": args.depth}, [matrix])
        times = []
        for iteration in range(args.rounds):
            booster.update(matrix, iteration)
            times.append(time.perf_counter())
        answers.put((index, float(np.median(np.diff(times)))))


def at_once(target: Any, given: list[tuple[Any, ...]]) -> float:
    """Run a function in several processes at once. Returns the median of their answers."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=target, args=(*arguments, answers)) for arguments in given]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300)[1] for _ in processes]
    for process in processes:
        process.join()
    return statistics.median(found)


def measure(sites: int, args: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, LocalFederation(sites=sites, sockets=True, folder=folder) as run:
        through = at_once(tunnelled, [(place.index, place.kit, args) for place in run.places])
        run.result()
        updates = [event.data["metrics"] for event in run.events if event.kind == "update" and event.round > 1]
        carried = statistics.mean(metrics["tunnel_bytes"] for metrics in updates)
    tracker = RabitTracker(sites, host_ip="127.0.0.1", port=0, sortby="task")
    tracker.start()
    directly = at_once(plain, [(index, tracker.worker_args(), args) for index in range(sites)])
    tracker.wait_for()
    trips = (2 * sites - 1) * (args.depth + 1)
    return {"sites": sites, "through": through, "directly": directly, "trips": trips, "kib": carried / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = [measure(sites, args) for sites in args.sites]
    if args.json:
        print(json.dumps(found))
        return
    table = Table(title=f"a boosting round of depth {args.depth}, {args.columns} columns: medians of {args.rounds}")
    heads = ("sites", "through the server, s", "plain rabit, s", "round trips", "added ms per trip", "KiB per site")
    for column in heads:
        table.add_column(column, justify="right")
    for row in found:
        per_trip = 1000 * (row["through"] - row["directly"]) / row["trips"]
        cells = [row["sites"], row["through"], row["directly"], row["trips"], per_trip, row["kib"]]
        table.add_row(*(f"{cell:.3g}" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
