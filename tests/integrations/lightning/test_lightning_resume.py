"""Sites that die and come back, with `ckpt_path` or without; real processes over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_models as m
import pytest
import torch
from lightning_site_process import SiteProcess

from fl_adapters import connect
from fl_adapters.lightning import FederatedCallback
from fl_adapters.torch.handshake.agreement import agreement
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError


@pytest.fixture
def sites() -> Iterator[Callable[..., SiteProcess]]:
    started: list[SiteProcess] = []

    def start(*given: Any, **values: Any) -> SiteProcess:
        started.append(SiteProcess(*given, **values))
        return started[-1]

    yield start
    for one in started:
        one.close()


def halving(kit: str) -> threading.Thread:
    """Run site 2 without a trainer: it sends half of each weight that it receives."""

    def take_part() -> None:
        module = m.module(dropout=0.0)
        initial = TorchState(module).get_state()
        with connect(kit=kit) as site:
            for task in site.tasks(initial=initial, agreement=agreement(module, framework="lightning")):
                half = {n: (a / 2).astype(a.dtype) for n, a in task.arrays.items()}
                task.submit(half, num_examples=m.ROWS)

    thread = threading.Thread(target=take_part, daemon=True)
    thread.start()
    return thread


def run_of(federation: Any, sites: Any, **settings: Any) -> Callable[..., SiteProcess]:
    """start(**values) starts a process of site 1 beside the halving site 2."""
    run = federation(sites=2, rounds=3, sockets=True, states=None, **settings)
    halving(run.places[1].kit)
    folder = run.folder / "process"
    start = lambda **values: sites(run.places[0].kit, folder, package=m.PACKAGES[0], **values)  # noqa: E731
    start.run = run  # type: ignore[attr-defined]
    return start


def checkpoints(start: Any) -> dict[int, str]:
    """Return optimizer step -> the file saved there at site 1."""
    files = (start.run.folder / "sites" / "site-1").rglob("*.ckpt")
    return {int(path.stem.rpartition("=")[2]): str(path) for path in files}


@pytest.mark.parametrize(
    ("every", "dies_at", "checkpoint"),
    [
        ("epoch", 5, {}),  # goes on from the start of round 2
        ("2 epochs", 11, {"save_on_train_epoch_end": True}),  # goes on in the middle of round 2
        ("epoch", 5, {"save_on_train_epoch_end": False}),  # a file of on_validation_end
    ],
)
def test_resumed_run_ends_as_if_nothing_had_happened(federation, sites, every, dies_at, checkpoint) -> None:
    expected = run_of(federation, sites, every=every)(checkpoint=checkpoint).result()
    start = run_of(federation, sites, every=every)
    start(dies_at=dies_at, checkpoint=checkpoint).died()
    saved = checkpoints(start)
    result = start(resume=saved[max(saved)], checkpoint=checkpoint).result()
    assert len(start.run.result().rounds) == 3
    assert result["steps"] == expected["steps"] == 9 * (2 if every == "2 epochs" else 1)
    assert result["rates"] == expected["rates"][-len(result["rates"]) :]
    for name, value in expected["weights"].items():
        assert torch.equal(result["weights"][name], value), name


def test_restart_without_a_checkpoint_takes_the_rounds_that_are_left(federation, sites) -> None:
    start = run_of(federation, sites)
    start(dies_at=5).died()
    again = start()
    result = again.result()
    assert result["steps"] == 6 and result["rates"] == pytest.approx([m.RATE * (1 - i / 9) for i in range(3, 9)])
    assert "behind round 2" in again.log and len(start.run.result().rounds) == 3


def test_resumed_a_round_behind_the_federation(federation, sites) -> None:
    """The site had the weights of round 3 when it died, but no checkpoint of them."""
    start = run_of(federation, sites)
    start(dies_at=6).died()
    again = start(resume=checkpoints(start)[3])
    result = again.result()
    assert result["steps"] == 6 and result["rates"] == pytest.approx([m.RATE * (1 - i / 9) for i in range(6, 9)])
    assert "behind round 3" in again.log
    assert m.same({n: t.numpy() for n, t in result["weights"].items()}, start.run.model())


def test_resumed_at_the_very_end_takes_the_final_weights(federation, sites) -> None:
    """Nothing is left to train, so Lightning skips all hooks of training."""
    start = run_of(federation, sites)
    start(dies_at=9).died()  # it had the final weights, and had not said so
    done = checkpoint_at_its_end(start.run.places[0].kit, checkpoints(start)[6])
    result = start(resume=done).result()
    assert result["steps"] == 9 and result["rates"] == []
    assert m.same({n: t.numpy() for n, t in result["weights"].items()}, start.run.model())


def checkpoint_at_its_end(kit: str, path: str) -> str:
    """Return a checkpoint of step 6 whose loops claim that all 9 steps are done."""
    checkpoint = torch.load(path, weights_only=False)
    loops = checkpoint["loops"]["fit_loop"]
    for counts in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counts.update(dict.fromkeys(counts, 3))
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for counts in (steps["total"], steps["current"]):
        counts.update(dict.fromkeys(counts, 9))
    end = str(Path(path).with_name("end.ckpt"))
    torch.save(checkpoint, end)
    return end


# --- checkpoints that do not lead into the run --------------------------------------------------------------------


def saved_by(callback: Any, folder: Path, **options: Any) -> str:
    """Return the path of a checkpoint at the end of one epoch."""
    trainer = m.trainer(callback, default_root_dir=folder, enable_checkpointing=True, **options)
    trainer.fit(m.module(), m.loader())
    return str(trainer.checkpoint_callback.best_model_path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("first", "'first'.*'second'"),
        ("second", "of round 2, but the federation is in round 1"),
        (None, "no federated"),
    ],
)
def test_checkpoint_of_something_else_is_refused(federation, tmp_path, name, problem) -> None:
    before = federation(name=name, rounds=1) if name else None
    callback = FederatedCallback(kit=before.places[0].kit) if before else None
    path = saved_by(callback, tmp_path / "before")
    run = federation(name="second", rounds=3)
    module = m.module()
    with pytest.raises(ConfigError, match=problem):
        m.trainer(FederatedCallback(kit=run.places[0].kit)).fit(module, m.loader(), ckpt_path=path)
    assert module.losses == []


def test_callback_state_is_in_the_checkpoint(federation, tmp_path) -> None:
    run = federation(name="first", rounds=1)
    path = saved_by(FederatedCallback(kit=run.places[0].kit), tmp_path)
    state = torch.load(path, weights_only=True)["callbacks"]["FederatedCallback"]
    assert state["job"] == "first" and state["progress"]["round"] == 2
    m.trainer(FederatedCallback(), max_epochs=2).fit(m.module(), m.loader(), ckpt_path=path)  # alone, it is left alone
