"""Function for virtual sites of the benchmarks: adds 1 to every weight of a model of $MIB MiB (default: 1)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import fl_adapters as fl


def initial() -> dict[str, Any]:
    """Initial weights, all zero."""
    return {"w": np.zeros(int(float(os.environ.get("MIB", "1")) * 2**18), np.float32)}


def train(task: fl.SiteTask, site: fl.Site) -> None:
    """Add 1 to every weight."""
    weights = task.arrays["w"]
    weights += 1
    task.submit({"w": weights}, num_examples=1)
