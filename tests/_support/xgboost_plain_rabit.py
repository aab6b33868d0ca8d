"""A script: the same training with XGBoost's own collective and none of our code, one process per site.

usage: xgboost_plain_rabit.py FOLDER ROUNDS [KIND ...]

    FOLDER/<number of kind>.npz holds the reference rows and the model that all begin with. The script leaves
    FOLDER/<number>.ubj, and prints the seconds per round of each kind.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xgboost
import xgboost_data as d
from xgboost import collective
from xgboost.tracker import RabitTracker

from fl_adapters.xgboost.model import without_categories
from fl_runtime.aggregation.trees.document import TreeModel


def grow(index: int | None, kind: str, reference: Any, model: bytearray, rounds: int) -> xgboost.Booster:
    """Train as one worker, or on all rows in one place if `index` is None."""
    params, columns, obj = d.parts(kind)
    plain = d.matrix(index, **columns)
    shared = xgboost.QuantileDMatrix(
        reference, feature_types=plain.feature_types, enable_categorical=True, max_bin=len(reference), nthread=1
    )
    mine = slice(None) if index is None else d.rows(index)
    x, label = columns.pop("x", d.X)[mine], columns.pop("label", d.BINARY)[mine]
    if hasattr(x, "iloc"):
        x = plain.get_data()  # the codes: XGBoost compares the categories of frames with those of the reference
        columns.pop("enable_categorical")
        model = bytearray(without_categories(TreeModel.from_document(model)).document())
    given = {name: values[mine] for name, values in columns.items()}
    data = xgboost.QuantileDMatrix(
        x,
        label,
        ref=shared,
        feature_types=plain.feature_types,
        feature_names=plain.feature_names,
        enable_categorical=True,
        max_bin=len(reference),
        nthread=1,
        **given,
    )
    booster = xgboost.Booster({**params, "max_bin": len(reference)}, [data], model_file=model)
    for iteration in range(rounds):
        booster.update(data, iteration, fobj=obj)
    return booster


def work(index: int, kind: str, start: Path, rounds: int, arguments: dict[str, Any], answers: Any) -> None:
    found = np.load(start)
    with collective.CommunicatorContext(**arguments, dmlc_task_id=str(index)):
        began = time.perf_counter()
        booster = grow(index, kind, found["reference"], bytearray(found["model"]), rounds)
        answers.put((index, bytes(booster.save_raw("ubj")), (time.perf_counter() - began) / rounds))


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    fork = multiprocessing.get_context("fork")
    seconds = {}
    for number, kind in enumerate(sys.argv[3:]):
        tracker = RabitTracker(len(d.SIZES), host_ip="127.0.0.1", port=0, sortby="task")
        tracker.start()
        answers = fork.Queue()
        given = (kind, folder / f"{number}.npz", rounds, tracker.worker_args(), answers)
        workers = [fork.Process(target=work, args=(index, *given)) for index in range(len(d.SIZES))]
        for worker in workers:
            worker.start()
        found = sorted(answers.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join()
        tracker.wait_for()
        assert len({model for _, model, _ in found}) == 1, kind
        (folder / f"{number}.ubj").write_bytes(found[0][1])
        seconds[kind] = found[0][2]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
