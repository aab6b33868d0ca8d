"""Federations in a notebook: a real kernel runs the cells, one for all tests of this file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ipykernel")
from notebook_kernel import Kernel, wait_until

DEFINITIONS = """
import os, time
import xml.etree.ElementTree
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import fl_adapters
from fl_adapters import Job, Simulation

STEP = 2.0
SETTINGS = {"name": "w", "sizes": [3], "none": float("nan")}


@dataclass
class Numbers:
    first: float = STEP


class Model:
    def __init__(self):
        self.weights = {SETTINGS["name"]: np.zeros(SETTINGS["sizes"], np.float32)}

    def trained(self, weights):
        return {name: array + amount() for name, array in weights.items()}


@lru_cache
def amount() -> float:
    return Numbers().first + fl_adapters.site().index


def simulated(name, script, **options):
    return Job(app=name, name=name, rounds=3).run(Simulation(sites=2, script=script, **options))
"""
TRAIN = """
def train():
    model = Model()
    xml.etree.ElementTree.Element("an import below a package")
    with fl_adapters.connect() as site:
        for task in site.tasks(initial=model.weights):
            task.submit(model.trained(task.arrays), num_examples=1, metrics={"train_loss": 1 / task.round})
            print("round", task.round, "of", site.name)
"""
HANGS = """
def hangs():
    with fl_adapters.connect() as site:
        for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
            open(f"{site.name}.pid", "w").write(str(os.getpid()))
            time.sleep(600)


def virtual_hangs(task, site):
    open(f"{site.name}.pid", "w").write(str(os.getpid()))
    time.sleep(600)


def two_virtual(name):
    simulation = Simulation(sites=2, engine="processes", function=virtual_hangs, initial={"w": np.zeros(3)})
    Job(app=name, name=name, rounds=1).run(simulation)
"""
REFUSED = """
import asyncio, functools
from fl_adapters import ConfigError

array, trained = np.zeros(3), lambda: None

class Numbers: pass
Numbers = Numbers()

def uses_array(): return helper()
def helper(): return array
def needs(rows, columns=2): ...
def makes(): yield
async def waits(): ...
def around(inner=3):
    def closed(): return inner
    return closed

for script in (uses_array, trained, needs, makes, waits, around(), functools.partial(needs, 1), "train.py"):
    try:
        simulated("refused", script)
    except ConfigError as error:
        print(str(error).replace("\\n", " ") + "|", end="")
for options in ({"engine": "processes"}, {"module": True}):
    try:
        simulated("refused", train, **options)
    except ConfigError as error:
        print(str(error).replace("\\n", " ") + "|", end="")
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("notebook"))
    kernel.run(DEFINITIONS)
    yield kernel
    kernel.close()


def test_a_function_of_a_cell_is_run_by_every_site(kernel: Kernel) -> None:
    kernel.run(TRAIN)
    shown = kernel.run("result = simulated('mine', train)")
    assert kernel.processes() == []
    (screen,) = shown.displays.values()  # one output, updated in place, also from threads of the server
    assert shown.updates > 1 and "round 3/3" in screen["text/html"] and "100%" in screen["text/html"]
    assert shown.texts == {"stdout": "", "stderr": ""}
    kernel.run(TRAIN.replace("1 / task.round", "5.0"))  # the cell is changed and run again
    told = kernel.run(
        "again = simulated('again', train)\n"
        "import json; log = result.folder / 'sites/site-2/log.txt'\n"
        "print(json.dumps([result.load()['w'].tolist(), log.read_text(), [dict(r.metrics) for r in again.rounds]]))"
    )
    weights, log, losses = json.loads(told.texts["stdout"].splitlines()[-1])
    assert weights == [3 * 2.5] * 3
    assert "round 3 of site-2" in log
    assert losses == [{"train_loss": 5.0}] * 3
    pytest.importorskip("matplotlib")
    (report,) = kernel.run("result").displays.values()
    assert "Metrics by round" in report["text/html"]
    (figure,) = kernel.run("result.plot()").displays.values()
    assert base64.b64decode(figure["image/png"]).startswith(b"\x89PNG")


def test_what_cannot_reach_a_site_is_refused_before_anything_starts(kernel: Kernel) -> None:
    kernel.run(TRAIN)
    messages = kernel.run(REFUSED).texts["stdout"].split("|")
    for message, words in zip(
        messages,
        [
            "uses array, a ndarray that the processes of the sites do not have",
            "the source of <lambda> is not known",
            "has the parameters rows, and sites call it without arguments",
            "makes() does not run it",
            "waits() does not run it",
            "closed() uses inner of the function around it",
            "functools.partial(<function needs",
            "'train.py' is not a function defined with def",
            "without engine",
            "without module",
            "",
        ],
        strict=True,
    ):
        assert words in message
        assert not message or "to do:" in message
    assert kernel.run("print(os.path.exists('runs/refused'))").texts["stdout"] == "False\n"


def site_processes(kernel: Kernel, folder: Path) -> list[psutil.Process]:
    """Wait until both sites train, and return the processes that the run has started."""
    files = [folder / f"site-{number}.pid" for number in (1, 2)]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files), "both sites to train")
    found = kernel.processes()
    assert {int(file.read_text()) for file in files} <= {process.pid for process in found}
    for file in files:
        file.unlink()
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.parametrize("run", ["simulated('{}', hangs)", "two_virtual('{}')"], ids=["a script", "a function"])
def test_neither_an_interrupt_nor_the_end_of_the_kernel_leaves_a_process(kernel: Kernel, run: str) -> None:
    kernel.run(HANGS)
    folder = Path(kernel.run("print(os.getcwd())").texts["stdout"].strip())
    cell = kernel.begin(run.format("interrupted" + run[:3]))
    started = site_processes(kernel, folder)
    kernel.interrupt()
    assert kernel.reply(cell)["ename"] == "KeyboardInterrupt"
    assert gone(started) and kernel.processes() == []
    kernel.begin(run.format("killed" + run[:3]))
    started = site_processes(kernel, folder)
    kernel.kill()
    wait_until(lambda: gone(started), f"the end of {started}")
    kernel.restart()
    kernel.run(DEFINITIONS)
    kernel.run(TRAIN + f"simulated('afterwards{run[:3]}', train)")
