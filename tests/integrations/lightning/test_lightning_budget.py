"""Rounds x `every` in the trainer's own loop, and the learning rate over all of them."""

from __future__ import annotations

import warnings
from typing import Any

import lightning_models as m
import pytest
import torch
from torch.utils.data import DataLoader

from fl_adapters.lightning import FederatedCallback
from fl_runtime.errors import ConfigError


def fit(run: Any, *, module: Any = None, loader: Any = None, callback: Any = None, **options: Any) -> Any:
    """Fit as the run's first site in the test's own thread; return the trainer."""
    module = m.module() if module is None else module
    trainer = m.trainer(FederatedCallback(kit=run.places[0].kit, **(callback or {})), **options)
    trainer.fit(module, m.loader() if loader is None else loader)
    return trainer


@pytest.mark.parametrize(
    ("every", "own", "steps"),
    [
        ("epoch", {"max_epochs": 1}, 9),  # lengthened
        ("epoch", {"max_epochs": 9}, 9),  # shortened
        ("2 epochs", {"max_epochs": -1, "max_steps": 2}, 18),
        (5, {"max_epochs": 1}, 15),
        (5, {"max_epochs": -1, "max_steps": 100}, 15),
        (2, {"max_epochs": 1, "accumulate_grad_batches": 2}, 6),  # 2 steps an epoch: the last batch steps alone
        ("epoch", {"max_epochs": 1, "accumulate_grad_batches": 2}, 6),
        ("epoch", {"max_epochs": 1, "limit_train_batches": 2}, 6),
        ("epoch", {"max_epochs": 1, "min_epochs": 20}, 9),
        ("epoch", {"fast_dev_run": True}, 3),
    ],
)
def test_trainer_runs_exactly_rounds_times_every(federation, pl, every, own, steps) -> None:
    run = federation(rounds=3, every=every)
    module = m.module(pl)
    trainer = fit(run, pl=pl, module=module, **own)
    assert len(run.result().rounds) == 3
    assert trainer.global_step == steps
    assert [e.data["local_steps"] for e in run.events if e.kind == "update"] == [steps // 3] * 3
    assert module.rates == pytest.approx([m.RATE * (1 - i / steps) for i in range(steps)])  # one schedule over all


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"max_epochs": 2}, ["fl-adapters: the job's 3 rounds of 1 epoch replace max_epochs=2"]),
        ({"max_epochs": 3}, []),
    ],
)
def test_a_length_that_the_job_replaces_is_said_once(federation, capfd, own, said) -> None:
    fit(federation(rounds=3), **own)
    assert [line for line in capfd.readouterr().err.splitlines() if "replace" in line] == said


def test_data_without_a_length_has_epochs_too(federation) -> None:
    run = federation(rounds=3)
    module = m.module()
    module.configure_optimizers = lambda: m.optimizer_for(module.parameters())
    trainer = fit(run, module=module, loader=DataLoader(m.Endless(), batch_size=m.BATCH))
    assert trainer.global_step == 3 * m.STEPS and len(run.result().rounds) == 3
    assert [e.data["num_examples"] for e in run.events if e.kind == "update"] == [m.ROWS] * 3


def test_epoch_that_the_module_cuts_short_ends_the_round(federation) -> None:
    run = federation(rounds=2)
    module = m.module()
    module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 2 else None
    trainer = m.trainer(FederatedCallback(kit=run.places[0].kit))
    trainer.fit(module, m.loader(), m.validation())
    assert trainer.global_step == 4 and len(run.result().rounds) == 2
    assert len([e for e in run.events if e.kind == "report"]) == 2


def test_script_argument_wins_over_the_job(federation) -> None:
    run = federation(rounds=2, every="epoch")
    assert fit(run, callback={"every": 4}).global_step == 8


@pytest.mark.parametrize(
    ("every", "own", "rounds", "steps"),
    [
        ("2 epochs", {"max_epochs": 3}, 2, 9),  # the last round is shorter
        ("epoch", {"max_epochs": -1, "max_steps": 7}, 3, 7),
        (2, {"max_epochs": 1}, 2, 3),
        (2, {"max_epochs": -1, "max_steps": 4}, 2, 4),
    ],
)
def test_trainers_own_budget_decides_without_rounds(federation, every, own, rounds, steps) -> None:
    run = federation(rounds=None, every=every)
    assert fit(run, **own).global_step == steps
    assert len(run.result().rounds) == rounds


def test_no_budget_at_all_is_an_error_before_the_first_step(federation) -> None:
    run = federation(rounds=None)
    module = m.module()
    module.configure_optimizers = lambda: m.optimizer_for(module.parameters())
    with pytest.raises(ConfigError, match="how long this run is"):
        fit(run, module=module, max_epochs=-1)
    assert module.losses == []


@pytest.mark.parametrize(
    ("interval", "horizon", "warned"), [("step", 5, True), ("step", 9, False), ("epoch", 2, True), ("epoch", 3, False)]
)
def test_schedule_with_a_horizon_of_its_own_is_left_alone_with_a_warning(federation, interval, horizon, warned) -> None:
    run = federation(rounds=3)
    module = m.module()

    def configure() -> Any:
        optimizer = m.optimizer_for(module.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=horizon)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    module.configure_optimizers = configure
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(run, module=module)
    assert any("the learning-rate schedule" in str(w.message) for w in caught) == warned


def test_num_examples_is_what_an_epoch_uses_of_the_training_set(federation) -> None:
    for options, wanted in (({}, m.ROWS), ({"limit_train_batches": 2}, 16)):
        run = federation(rounds=1)
        fit(run, **options)
        assert [e.data["num_examples"] for e in run.events if e.kind == "update"] == [wanted]
    run = federation(rounds=1)
    fit(run, callback={"num_examples": 7})
    assert [e.data["num_examples"] for e in run.events if e.kind == "update"] == [7]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_loss_of_the_round(federation, accumulate) -> None:
    run = federation(rounds=2)
    module = m.module()
    fit(run, module=module, accumulate_grad_batches=accumulate)
    told = [e.data["metrics"]["train_loss"] for e in run.events if e.kind == "update"]
    assert told == pytest.approx([sum(module.losses[:3]) / 3, sum(module.losses[3:]) / 3], rel=1e-5)
