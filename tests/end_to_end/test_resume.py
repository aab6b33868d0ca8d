"""A simulation that failed or was killed continues where it stopped."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fl_runtime.store.tensorfile import read_tensors

if TYPE_CHECKING:
    from conftest import Bench

# Adds its number in each round; in round 3 the second site dies as often as there is a file that says so.
DYING = """
import os, sys
from pathlib import Path
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3)}):
        if task.round == 3 and site.index == 1:
            print("in round 3", flush=True)
            if Path("die").exists():
                os._exit(3)
            while Path("hang").exists():
                pass
        task.submit({"w": task.arrays["w"] + site.index + 1}, num_examples=1)
"""


def test_a_run_that_a_site_has_ended_is_resumed(bench: Bench) -> None:
    bench.script("dying.py", DYING)
    (bench.folder / "die").touch()
    failed = bench.run("simulate", "dying.py", "--sites", "2", "--rounds", "5", "--name", "study")
    assert failed.returncode == 1
    taken = bench.run("simulate", "dying.py", "--sites", "2", "--rounds", "5", "--name", "study")
    assert "job resume" in taken.stderr
    (bench.folder / "die").unlink()
    found = bench.json("job", "resume", "runs/study")
    assert found["rounds"] == 5
    model = read_tensors(bench.folder / "runs" / "study" / "model" / "model.safetensors")
    np.testing.assert_array_equal(model["w"], np.full(3, 7.5))
    log = (bench.folder / "runs" / "study" / "sites" / "site-2" / "log.txt").read_text()
    assert log.count("in round 3") == 2
    with (bench.folder / "runs" / "study" / "history.csv").open() as file:
        rounds = [row["round"] for row in csv.DictReader(file) if row["site"] == "global"]
    assert rounds == ["1", "2", "3", "4", "5"]
    over = bench.run("job", "resume", "runs/study")
    assert over.returncode == 1
    assert "has finished" in over.stderr


def test_a_run_that_was_killed_is_resumed(bench: Bench, until: Callable[[Callable[[], bool], str], None]) -> None:
    bench.script("dying.py", DYING)
    (bench.folder / "hang").touch()
    process = bench.start("simulate", "dying.py", "--sites", "2", "--rounds", "4", "--name", "study")
    log = bench.folder / "runs" / "study" / "sites" / "site-2" / "log.txt"
    until(lambda: log.exists() and "in round 3" in log.read_text(), "round 3")
    twice = bench.run("job", "resume", "runs/study")
    assert "another server is running this job" in twice.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    (bench.folder / "hang").unlink()
    assert bench.json("job", "resume", "runs/study")["rounds"] == 4
    model = read_tensors(bench.folder / "runs" / "study" / "model" / "model.safetensors")
    np.testing.assert_array_equal(model["w"], np.full(3, 6.0))


def test_a_folder_without_a_run_is_named(bench: Bench) -> None:
    done = bench.run("job", "resume", "runs/nothing")
    assert done.returncode == 1
    assert "there is no simulation to resume here\n" in done.stderr
    assert "runs/nothing" in done.stderr
