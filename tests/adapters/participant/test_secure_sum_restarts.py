"""A server that is killed within the steps of a secure sum, and sites that are: the run ends with the same bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import at_once
from server_process import ServerProcess, server_process

import fl_adapters as fl
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.types import Arrays

SITES, ROUNDS = 3, 4


def kit_of(server: ServerProcess, folder: Path, index: int) -> Kit:
    name = f"site-{index + 1}"
    return Kit(job="test", site=name, index=index, count=SITES, server=server.address, token=f"secret of {name}",
               run=str(folder), simulated=True, patience_s=300)  # fmt: skip


def train(server: ServerProcess, folder: Path, index: int, at_round: Any = None) -> Arrays:
    kit = kit_of(server, folder, index)
    path = kit.save(folder / "kits" / kit.site)
    with fl.connect(kit=str(path)) as site:
        for task in site.tasks(initial={"w": np.zeros(50_000, np.float32)}):
            if at_round is not None:
                at_round(task.round)
            noise = np.random.default_rng([index, task.round]).normal(size=50_000)
            task.submit({"w": (task.arrays["w"] + noise).astype(np.float32)}, num_examples=index + 1)
        arrays = {name: np.array(array) for name, array in site.arrays.items()}
    close_sessions("its script has ended", kit, failed=False)
    return arrays


def models(folder: Path, disturb: Any = None) -> list[bytes]:
    with server_process(folder / "run", SITES, rounds=ROUNDS, secure_sum=True) as server:
        over = threading.Event()
        disturber = threading.Thread(target=disturb, args=(server, over)) if disturb else None
        if disturber:
            disturber.start()
        try:
            finals = at_once(range(SITES), lambda index: train(server, folder, index))
        finally:
            over.set()
            if disturber:
                disturber.join()
        return [final["w"].tobytes() for final in finals]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    first, *others = models(tmp_path_factory.mktemp("plain"))
    assert others == [first] * (SITES - 1)
    return first


def test_a_server_that_is_killed_again_and_again(tmp_path: Path, undisturbed: bytes) -> None:
    kills: list[int] = []

    def disturb(server: ServerProcess, over: threading.Event) -> None:
        draw = np.random.default_rng(3)
        while len(kills) < 4 and not over.wait(float(draw.uniform(0.05, 0.3))):
            server.kill()
            server.start()
            kills.append(1)

    assert models(tmp_path, disturb) == [undisturbed] * SITES
    assert kills
