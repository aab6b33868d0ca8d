"""Rounds x `every` in Ignite's loop, and what a round reports."""

from __future__ import annotations

import warnings
from typing import Any

import monai_models as m
import pytest
import torch
from ignite.engine import Events
from monai.handlers import LrScheduleHandler
from torch.utils.data import DataLoader

from fl_adapters.monai import FederatedHandler
from fl_runtime.errors import ConfigError


def train(run: Any, handlers: Any = (), *, handler: Any = None, net: Any = None, **options: Any) -> Any:
    """Train as the federation's first site in the test's own thread; return the trainer."""
    ours = FederatedHandler(kit=run.places[0].kit, **(handler or {}))
    training = m.trainer(net or m.network(), [*handlers, ours], **options)
    training.run()
    return training


def updates(run: Any, field: str) -> list[Any]:
    return [e.data[field] for e in run.events if e.kind == "update"]


@pytest.mark.parametrize(("epochs", "said"), [(2, True), (3, False)])
def test_a_length_that_the_job_replaces_is_said_once(federation, capfd, epochs, said) -> None:
    train(federation(rounds=3), epochs=epochs)
    expected = ["fl-adapters: the job's 3 rounds of 1 epoch replace max_epochs=2"] if said else []
    assert [line for line in capfd.readouterr().err.splitlines() if "replace" in line] == expected


@pytest.mark.parametrize(
    ("every", "own", "iterations"),
    [
        ("epoch", {"epochs": 1}, 9),  # lengthened
        ("epoch", {"epochs": 9}, 9),  # shortened
        ("2 epochs", {}, 18),
        (5, {"epochs": 1}, 15),
        (5, {"epochs": 100}, 15),
        (3, {}, 9),  # rounds of steps that end with epochs
        ("epoch", {"epoch_length": 2}, 6),
        (4, {"epoch_length": 5}, 12),
    ],
)
@pytest.mark.parametrize("decollate", [True, False])
def test_trainer_runs_exactly_rounds_times_every(federation, every, own, iterations, decollate) -> None:
    run = federation(rounds=3, every=every)
    seen = m.Losses()
    training = train(run, [seen], decollate=decollate, **own)
    assert len(run.result().rounds) == 3
    assert training.state.iteration == len(seen.losses) == iterations
    assert updates(run, "local_steps") == [iterations // 3] * 3
    assert len(updates(run, "metrics")[0]) == 1


@pytest.mark.skipif(not m.ACCUMULATES, reason="this MONAI cannot accumulate gradients")
@pytest.mark.parametrize(("every", "iterations", "steps"), [(2, 9, 2), ("epoch", 9, 2), (3, 14, 3)])
def test_accumulated_batches_are_one_step(federation, every, iterations, steps) -> None:
    run = federation(rounds=3, every=every)
    training = train(run, accumulation_steps=2)  # 2 steps an epoch: the last batch steps alone
    assert training.state.iteration == iterations
    assert updates(run, "local_steps") == [steps] * 3


def takes_data_without_a_length() -> bool:
    try:
        m.trainer(m.network(), data=DataLoader(m.Endless()))
    except TypeError:  # MONAI before 1.5
        return False
    return True


@pytest.mark.skipif(not takes_data_without_a_length(), reason="this MONAI needs a length")
def test_data_without_a_length_has_epochs_too(federation) -> None:
    for every, decollate in (("epoch", True), ("epoch", False), (3, True)):
        run = federation(rounds=3, every=every)
        training = train(run, data=DataLoader(m.Endless(), batch_size=m.BATCH), decollate=decollate)
        assert training.state.iteration == 3 * m.STEPS and len(run.result().rounds) == 3
        assert updates(run, "num_examples") == [m.ROWS] * 3


@pytest.mark.parametrize(("every", "rounds"), [("epoch", 3), (3, 2)])
def test_epochs_that_are_cut_short(federation, every, rounds) -> None:
    run = federation(rounds=rounds, every=every)
    training = m.trainer(m.network(), [FederatedHandler(kit=run.places[0].kit)])
    training.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.terminate_epoch() if e.state.batch else None)
    training.run()  # one batch an epoch
    assert len(run.result().rounds) == rounds
    assert training.state.iteration == (3 if every == "epoch" else 6)


def test_script_argument_wins_over_the_job(federation) -> None:
    run = federation(rounds=2, every="epoch")
    assert train(run, handler={"every": 4}).state.iteration == 8


@pytest.mark.parametrize(
    ("every", "epochs", "rounds", "iterations"), [("2 epochs", 3, 2, 9), (2, 1, 2, 3), (2, 2, 3, 6)]
)
def test_trainers_own_budget_decides_without_rounds(federation, every, epochs, rounds, iterations) -> None:
    run = federation(rounds=None, every=every)
    assert train(run, epochs=epochs).state.iteration == iterations  # the last round may be shorter
    assert len(run.result().rounds) == rounds


@pytest.mark.skipif(not takes_data_without_a_length(), reason="this MONAI needs a length")
def test_no_budget_at_all_is_an_error_before_the_first_step(federation) -> None:
    run = federation(rounds=None, every=5)
    seen = m.Losses()
    with pytest.raises(ConfigError, match="how long this run is"):
        train(run, [seen], data=DataLoader(m.Endless(), batch_size=m.BATCH))
    assert seen.losses == []


@pytest.mark.parametrize(
    ("epoch_level", "horizon", "warned"), [(False, 5, True), (False, 9, False), (True, 2, True), (True, 3, False)]
)
def test_schedule_with_a_horizon_of_its_own_is_left_alone_with_a_warning(
    federation, epoch_level, horizon, warned
) -> None:
    run = federation(rounds=3)
    net = m.network()
    optimizer = m.optimizer_for(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=horizon)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handlers = [LrScheduleHandler(schedule, print_lr=False, epoch_level=epoch_level)]
        train(run, handlers, net=net, optimizer=optimizer)
    assert any("the learning-rate schedule" in str(w.message) for w in caught) == warned


def test_num_examples_is_what_an_epoch_uses_of_the_training_set(federation) -> None:
    for options, wanted in (({}, m.ROWS), ({"epoch_length": 2}, 16), ({"handler": {"num_examples": 7}}, 7)):
        run = federation(rounds=1)
        train(run, **options)
        assert updates(run, "num_examples") == [wanted]


@pytest.mark.parametrize("decollate", [True, False])
def test_training_loss_of_the_round(federation, decollate) -> None:
    run = federation(rounds=2)
    seen = m.Losses()
    train(run, [seen], decollate=decollate)
    told = [metrics["train_loss"] for metrics in updates(run, "metrics")]
    assert told == pytest.approx([sum(seen.losses[:3]) / 3, sum(seen.losses[3:]) / 3], rel=1e-5)


def test_iteration_update_of_the_users_own(federation) -> None:
    """It may return anything, and fires none of MONAI's events."""
    run = federation(rounds=2)

    def update(engine: Any, batch: Any) -> float:
        engine.optimizer.zero_grad()
        loss = m.cross_entropy(engine.network(batch["image"]), batch["label"])
        loss.backward()
        engine.optimizer.step()
        return loss.item()

    training = train(run, iteration_update=update)
    assert training.state.iteration == 6 and "train_loss" in updates(run, "metrics")[0]
    assert m.same(m.weights(training.network), run.model())
