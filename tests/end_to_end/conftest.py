"""The command line as a user runs it: in its own process and folder, with scripts of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import fl_adapters

TIMEOUT_S = 120
_PACKAGES = str(Path(fl_adapters.__file__).parents[1])

# A site that adds its number to the weights, each weighted by ten times that number.
ADDING = """
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros((4, 3), np.float32)}):
        number = site.index + 1
        task.report({"loss": 10.0 - task.round}, 5)
        task.submit({"w": task.arrays["w"] + number}, num_examples=10 * number, local_steps=2,
                    metrics={"train_loss": 1.0 / task.round})
"""


@dataclass
class Bench:
    """A working directory with scripts, and the command line to run there."""

    folder: Path
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    def script(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start `fl-adapters ARGS` with stdout and stderr piped."""
        environment = {name: value for name, value in os.environ.items() if name != "FL_ADAPTERS_KIT"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGES, environment.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "fl_adapters.cli", *args],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def json(self, *args: str) -> dict[str, Any]:
        """Run a command with --json, which must succeed, and return the object that it prints."""
        done = self.run(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    @property
    def runs(self) -> list[str]:
        folder = self.folder / "runs"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for the test. No process of a run may be left afterwards."""
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    yield tmp_path
    started = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert psutil.wait_procs(started, timeout=20)[1] == []


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One bench for all tests of a file."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    yield bench
    bench.close()


@pytest.fixture
def adding(bench: Bench) -> str:
    """The name of the ADDING script in the bench's folder."""
    return bench.script("adding.py", ADDING).name


@pytest.fixture
def until() -> Callable[[Callable[[], bool], str], None]:
    """until(condition, what): wait until a condition holds, or fail with `what`."""

    def wait(condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"waited in vain for: {what}"
            time.sleep(0.02)

    return wait
