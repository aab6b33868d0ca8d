"""Processes that a training script forks while it is connected, as PyTorch's data loaders do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKING = """
import os, time
import numpy as np
import fl_adapters as fl
from fl_adapters.testing import LocalFederation

def threads():
    return len(os.listdir("/proc/self/task"))

with LocalFederation(sites=1, sockets=True, rounds=1) as run, fl.connect(kit=run.places[0].kit) as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        for _ in range(20):
            worker = os.fork()
            if worker == 0:
                end = time.monotonic() + 0.05
                while threads() == 1 and time.monotonic() < end:
                    time.sleep(0.001)
                os._exit(threads())
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 1
        task.submit(task.arrays, num_examples=1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads as Linux shows them")
def test_a_forked_process_gets_no_threads_that_go_on_with_the_connection() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run([sys.executable, "-c", FORKING], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
