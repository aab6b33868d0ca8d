"""A script: a site that grows trees in mode "levelwise", and may kill itself before one of them.

usage: levelwise_site_process.py KIT ROUNDS DIES_BEFORE MODEL
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import levelwise_rows as d
import xgboost

import fl_adapters
from fl_adapters.xgboost import train

PARAMS: dict[str, Any] = {
    "objective": "binary:logistic",
    "max_depth": 3,
    "max_bin": 16,
    "nthread": 1,
    "tree_method": "hist",
}


class Killer(xgboost.callback.TrainingCallback):
    """Kills this process before a tree; -1 for none."""

    def __init__(self, dies_before: int) -> None:
        super().__init__()
        self.dies_before = dies_before

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if epoch == self.dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def trained(kit: str, index: int, rounds: int, dies_before: int = -1) -> bytes:
    """The model that a site gets, as UBJSON."""
    data = d.matrix(2 * index, "binary:logistic")
    return bytes(
        train(PARAMS, data, rounds, mode="levelwise", kit=kit, callbacks=[Killer(dies_before)]).save_raw("ubj")
    )


if __name__ == "__main__":
    kit, rounds, dies_before, model = sys.argv[1:]
    Path(model).write_bytes(trained(kit, fl_adapters.site(kit).index, int(rounds), int(dies_before)))
