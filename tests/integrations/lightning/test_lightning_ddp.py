"""DDP and FSDP2 within a site: two processes over gloo, started by Lightning's own launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning_ddp_site
import lightning_models as m
import pytest
import torch
from lightning_ddp_site import fit
from safetensors.torch import load_file

from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions

TIMEOUT_S = 240


def on_two_ranks(kit: str, folder: Path, by: str = "ddp") -> tuple[int, str]:
    """Train a site on two ranks; return its exit status and output. Each rank leaves a file in `folder`."""
    folder.mkdir()
    command = [sys.executable, lightning_ddp_site.__file__, m.PACKAGES[0], str(folder), by]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(p for p in sys.path if p)
    own = {"FL_ADAPTERS_KIT": kit, "MASTER_PORT": port, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def partner(run: Any, **more: Any) -> threading.Thread:
    """Run site 2 on one rank, in a thread of the test."""

    def take_part() -> None:
        with suppress(Exception):
            fit(m.package(), run.places[1].kit, devices=1, **more)
        close_sessions("its script has ended", read_kit(run.places[1].kit))

    thread = threading.Thread(target=take_part, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "strategy", "phases"),
    [
        ("ddp", "fedavg", 1),
        ("ddp", "fedprox:mu=0.5", 1),
        ("ddp", "scaffold", 1),
        ("ddp", "ditto", 2),
        ("fsdp2", "fedavg", 1),
    ],
)
def test_two_ranks_end_as_one_process_would(federation, tmp_path, by, strategy, phases) -> None:
    settings = {"sites": 2, "rounds": 3, "optimizer_state": "average", "every": 2, "strategy": strategy}
    settings["cross_site"] = strategy == "fedavg"
    plain = federation(**settings)
    plain.run(lambda place: fit(m.package(), place.kit, devices=1))
    run = federation(sockets=True, states=None, **settings)
    other = partner(run)
    status, output = on_two_ranks(run.places[0].kit, tmp_path / "results", by)
    assert status == 0, output
    other.join(TIMEOUT_S)
    assert len(run.result().rounds) == 3
    for rank in (0, 1):
        left = torch.load(tmp_path / "results" / f"rank-{rank}.pt", weights_only=True)
        assert left["steps"] == 6 * phases and left["logged"] == 3
        assert m.same({n: t.numpy() for n, t in left["weights"].items()}, run.model())
    written = torch.load(run.folder / "model" / "model.ckpt", weights_only=True)["state_dict"]
    for saved in (written, load_file(run.folder / "model" / "model.safetensors")):
        assert m.same({n: t.numpy() for n, t in saved.items()}, run.model())
    for name, value in plain.model().items():
        assert run.model()[name] == pytest.approx(value, abs=1e-6), name
    told = [[e for e in one.events if e.site == "site-1"] for one in (run, plain)]
    examples, losses = (
        [[e.data[k] for e in t if e.kind == "update"] for t in told] for k in ("num_examples", "metrics")
    )
    assert examples[0] == examples[1] == [m.ROWS] * 3 and len(losses[0]) == 3
    scores = [[e.data["metrics"]["loss"] for e in t if e.kind == "report"] for t in told]
    assert len(scores[0]) == 3 and scores[0] == pytest.approx(scores[1], abs=1e-5)  # means over the ranks
    if settings["cross_site"]:
        mine, alone = (next(e.data for e in one.events if e.kind == "cross_site")["matrix"] for one in (run, plain))
        assert {model: sorted(row) for model, row in mine.items()} == {m: ["site-1", "site-2"] for m in alone}
        for model in alone:
            assert mine[model]["site-1"] == pytest.approx(alone[model]["site-1"], abs=1e-5)


@pytest.mark.slow
def test_no_rank_hangs_when_the_run_fails(federation, tmp_path) -> None:
    run = federation(sites=2, rounds=3, every=2, sockets=True, states=None)
    partner(run, fail_at=3)
    status, output = on_two_ranks(run.places[0].kit, tmp_path / "results")
    assert status != 0 and "site-2" in output
    assert list((tmp_path / "results").glob("rank-*.pt")) == []
