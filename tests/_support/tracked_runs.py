"""A script whose runs are tracked, and what a run's own history says of it."""

from __future__ import annotations

import csv
from pathlib import Path

SCRIPT = """
import sys

import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(2, np.float32)}):
        if "fail" in sys.argv and task.round == 2:
            raise SystemExit(3)
        task.submit({"w": task.arrays["w"] + 1}, num_examples=site.index + 1, metrics={"loss": 1.0 / task.round})
"""


def history_of(folder: Path) -> dict[tuple[str, int], float]:
    """Metric and round -> value, from the run's own history.csv."""
    rows = csv.DictReader((folder / "history.csv").open())
    found = {}
    for row in rows:
        prefix = "" if row["site"] == "global" else f"site/{row['site']}/"
        for name in ("train_loss", "loss"):
            if row.get(name):
                found[prefix + name, int(row["round"])] = float(row[name])
        if row["site"] == "global":
            for name in ("seconds", "bytes_up", "bytes_down"):
                found[f"round/{name}", int(row["round"])] = float(row[name])
    assert len(found) > 10
    return found
