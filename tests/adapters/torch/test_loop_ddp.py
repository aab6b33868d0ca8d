"""`FederatedLoop` on two ranks of a site: rank 0 alone talks, and the result is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_ddp_site
from torch_ddp_site import train
from torch_loops import ROWS, STATES

from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.testing import LocalFederation

TIMEOUT_S = 240


def on_two_ranks(kit: str, folder: Path) -> list[tuple[int, str]]:
    """Train a site on two ranks; return each one's exit status and output. Each leaves a file in `folder`."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(p for p in sys.path if p)
    own = {"FL_ADAPTERS_KIT": kit, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, torch_ddp_site.__file__, str(rank), str(folder)],
            env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


def partner(run: LocalFederation, **more: Any) -> threading.Thread:
    """Run site 2 on one rank, in a thread of the test."""

    def take_part() -> None:
        with suppress(Exception):
            train(run.places[1].kit, **more)
        close_sessions("its script has ended", read_kit(run.places[1].kit))

    thread = threading.Thread(target=take_part, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "ditto"])
def test_two_ranks_end_as_one_process_would(tmp_path: Path, strategy: str) -> None:
    settings: dict[str, Any] = {"rounds": 3, "optimizer_state": "average", "every": 2, "strategy": strategy}
    settings["cross_site"] = strategy == "fedavg"
    with LocalFederation(sites=2, states=STATES, **settings) as plain:
        plain.run(lambda place: train(place.kit))
        wanted, alone = plain.model(), [e for e in plain.events if e.site == "site-1"]
    with LocalFederation(sites=2, sockets=True, **settings) as run:
        other = partner(run)
        outcomes = on_two_ranks(run.places[0].kit, tmp_path / "results")
        assert [status for status, _ in outcomes] == [0, 0], outcomes
        other.join(TIMEOUT_S)
        assert len(run.result().rounds) == 3
        model, mine = run.model(), [e for e in run.events if e.site == "site-1"]
    for rank in (0, 1):
        left = torch.load(tmp_path / "results" / f"rank-{rank}.pt", weights_only=True)
        assert left["stats"]["federation_round"] == 3
        for name, array in model.items():
            assert left["weights"][name].numpy().tobytes() == array.tobytes(), name
    for name, value in wanted.items():
        assert model[name] == pytest.approx(value, abs=1e-6), name
    for told in (mine, alone):
        assert [e.data["num_examples"] for e in told if e.kind == "update"] == [ROWS] * 3
    scores = [[e.data["metrics"]["loss"] for e in told if e.kind == "report"] for told in (mine, alone)]
    assert len(scores[0]) == 3
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_no_rank_hangs_when_the_run_fails(tmp_path: Path) -> None:
    with LocalFederation(sites=2, rounds=3, every=2, sockets=True) as run:
        partner(run, fail_at=3)
        outcomes = on_two_ranks(run.places[0].kit, tmp_path / "results")
        assert all(status != 0 and "site-2" in output for status, output in outcomes), outcomes
    assert list((tmp_path / "results").glob("rank-*.pt")) == []
