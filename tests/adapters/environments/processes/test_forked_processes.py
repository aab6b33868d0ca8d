"""Site processes that are forked after the imports, beside the same scripts under a Python of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fl_adapters.environments.processes import SiteProcesses, leading_imports
from fl_adapters.environments.processes.forked_processes import ForkedProcesses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")

WAIT_S = 60.0
SHOWN = '''"""A script."""
import multiprocessing
import os
import sys
import numpy as np


def square(x):
    return x * x


if __name__ == "__main__":
    print(sys.argv, __name__, __file__, __doc__, sys.path[0], os.getcwd(), __spec__, sys.stdin.read() == "")
    print(os.environ["KIT"], "PATH" in os.environ, os.getsid(0) == os.getpid(), sys.modules["__main__"].os is os)
    print(multiprocessing.current_process().name, sys.stdout.encoding, sys.stdout.line_buffering)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # finds functions of this file by its path
        print(pool.map(square, [2, 3]))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, in which Python and its children print at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    return tmp_path


class Forks:
    """Runs a script by forking, and waits for it."""

    def __init__(self, command: list[str]) -> None:
        self.command = [sys.executable, *command]
        forked = ForkedProcesses.of(self.command, os.environ)
        assert forked is not None
        self.forked = forked
        self.processes = SiteProcesses(forked=forked)

    def run(self, *sites: str) -> dict[str, tuple[int, str]]:
        """Exit status and output by site."""
        for site in sites:
            self.processes.start(site, self.command, {**os.environ, "KIT": site}, Path("logs", site))
        ended: dict[str, int] = {}
        end = time.monotonic() + WAIT_S
        while len(ended) < len(sites) and time.monotonic() < end:
            self.forked.receive(0.05)
            ended.update(self.processes.ended())
        return {site: (status, Path("logs", site).read_text()) for site, status in ended.items()}


@pytest.fixture
def forks() -> Iterator[list[Forks]]:
    made: list[Forks] = []
    yield made
    for one in made:
        one.processes.close()


def alone(command: list[str], site: str) -> tuple[int, str]:
    """Exit status and output of the same command under a Python of its own."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "KIT": site},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "ending",
    [
        SHOWN,
        "import numpy, sys\nsys.exit(3)\n",
        "import numpy, sys\nsys.exit('no data')\n",
        "import numpy\ndef f():\n    return 1 / 0\n"
        "try:\n    f()\nexcept ArithmeticError as error:\n    raise KeyError('x') from error\n",
        "import numpy, os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
        "import numpy, atexit, threading\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: print('thread')).start()\n",
        "import numpy\nfrom numpy import nothing_of_this_name\n",
        "# coding: latin-1\nimport numpy\nprint('caf\\xe9')\n",
    ],
)
def test_a_script_runs_as_under_python(folder: Path, forks: list[Forks], ending: str) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "train.py").write_text(ending, encoding="latin-1")
    command = ["in/train.py", "--rate", "0.1"]
    forks.append(Forks(command))
    assert forks[0].run("a", "b") == {site: alone(command, site) for site in ("a", "b")}


def test_a_module_of_ours_runs_as_under_python(folder: Path, forks: list[Forks]) -> None:
    command = ["-m", "fl_adapters.statistics"]
    forks.append(Forks(command))
    status, printed = forks[0].run("a")["a"]
    assert (status, printed) == alone(command, "a") and status


def test_imports_run_once_and_what_they_print_is_in_every_log(folder: Path, forks: list[Forks]) -> None:
    (folder / "numpy.py").write_text("import os\nprint('imported by', os.getpid())\n")  # as a slow package would warn
    (folder / "train.py").write_text("import numpy\nprint('trained')\n")
    forks.append(Forks(["train.py"]))
    printed = [text for _, text in forks[0].run("a", "b", "c").values()]
    assert len(set(printed)) == 1 and re.fullmatch(r"imported by \d+\ntrained\n", printed[0])


def test_random_numbers_differ_by_site(folder: Path, forks: list[Forks]) -> None:
    (folder / "train.py").write_text(
        "import random\nimport numpy as np\n"
        "print(np.random.rand(), np.random.default_rng().random(), random.random())\n"
    )
    forks.append(Forks(["train.py"]))
    drawn = [number for _, text in forks[0].run("a", "b").values() for number in text.split()]
    assert len(set(drawn)) == 6


def test_frameworks_leave_no_thread_that_a_fork_would_lose(folder: Path, forks: list[Forks]) -> None:
    found = [name for name in ("torch", "pandas", "sklearn", "xgboost", "transformers") if find_spec(name)]
    (folder / "train.py").write_text(f"import {', '.join(found)}\n")
    forks.append(Forks(["train.py"]))
    assert forks[0].run("a") == {"a": (0, "")}
    threads = [file.read_text().strip() for file in Path(f"/proc/{forks[0].forked.pid}/task").glob("*/comm")]
    knowing_forks = {"jemalloc_bg_thd"}  # of pyarrow; it is made anew in every copy
    assert len([name for name in threads if name not in knowing_forks]) <= max(1, _threads_of_numpy())


def _threads_of_numpy() -> int:
    count = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, check=True).stdout)


def test_without_the_process_that_forks_sites_start_by_themselves(folder: Path, forks: list[Forks]) -> None:
    (folder / "train.py").write_text("import numpy\nimport time\nprint('began')\nwhile True:\n    time.sleep(0.1)\n")
    forks.append(Forks(["train.py"]))
    one, processes = forks[0], forks[0].processes
    processes.start("a", one.command, os.environ, Path("logs/a"))
    _wait_for("began", 1)
    os.kill(one.forked.pid, signal.SIGKILL)
    one.forked.receive(WAIT_S)
    assert processes.ended() == [("a", -signal.SIGKILL)]
    processes.start_again("a")
    _wait_for("began", 2)
    assert processes.running == ("a",) and processes.ended() == []


def _wait_for(word: str, times: int) -> None:
    end = time.monotonic() + WAIT_S
    while Path("logs/a").read_text().count(word) < times:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "shared"),
    [
        ('"""Doc."""\nfrom __future__ import annotations\nimport os\nimport torch\nx = 1\nimport json', "os torch"),
        ("import numpy as np, sys\nfrom torch import nn, optim", "numpy sys torch:nn,optim"),
        ("import os\nos.environ['HF_HOME'] = 'x'\nimport torch", ""),
        ("import mine\nimport torch", ""),
        ("from . import mine\nimport torch", ""),
        ("import torch\nimport mine\nimport numpy", "torch"),
        ("import numpy\nimport keras", "numpy"),
        ("import numpy\nfrom fl_adapters.keras import FederatedCallback", "numpy"),
        ("import numpy\nfrom fl_adapters import keras", "numpy"),
        ("import fl_adapters as fl", "fl_adapters fl_adapters.loop fl_runtime.transport.grpc"),
        ("import json", ""),
        ("import torch\nx = (", ""),
    ],
)
def test_only_what_comes_first_and_is_known_is_shared(tmp_path: Path, script: str, shared: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(script)
    found = [(module, names) for module, names in leading_imports.of_script(path) if module != "__future__"]
    assert " ".join(module + ":" * bool(names) + ",".join(names) for module, names in found) == shared
