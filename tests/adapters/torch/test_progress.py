"""The arithmetic of rounds that all torch trainers share: budgets, progress, tallies and schedules."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fl_adapters.participant.options import Every
from fl_adapters.torch.progress import (
    Progress,
    RoundBudget,
    Tally,
    advance_schedule,
    rows_of,
    size_of,
    warn_if_schedule_ends_early,
)
from fl_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("every", "phases", "length", "rounds"),
    [
        ("epoch", 1, {"epochs": 3, "steps": None, "per_epoch": None}, 3),
        ("2 epochs", 1, {"epochs": 3, "steps": None, "per_epoch": 4}, 2),  # the last round is shorter
        ("epoch", 2, {"epochs": 4, "steps": None, "per_epoch": 4}, 2),
        ("epoch", 1, {"epochs": 9, "steps": 7, "per_epoch": 3}, 3),  # the limit that comes first
        (5, 1, {"epochs": 2, "steps": None, "per_epoch": 4}, 2),
        (5, 1, {"epochs": None, "steps": 11, "per_epoch": None}, 3),
    ],
)
def test_rounds_within_a_trainers_own_length(every, phases, length, rounds) -> None:
    budget = RoundBudget(Every.parse(every), None, phases)
    assert budget.rounds_within(**length, where="here", fix="max_steps") == rounds


@pytest.mark.parametrize("length", [{"epochs": None, "steps": None}, {"epochs": 3, "steps": None}])
def test_unknown_length_is_an_error_that_names_what_to_set(length) -> None:
    budget = RoundBudget(Every.parse(5), None)
    with pytest.raises(ConfigError, match="how long this run is") as error:
        budget.rounds_within(**length, per_epoch=None, where="the trainer", fix="max_steps")
    assert "max_steps" in str(error.value)


def test_what_a_site_has_made_when_a_round_begins() -> None:
    assert RoundBudget(Every.parse("2 epochs"), 9).before(3, 4) == (4, 16)
    assert RoundBudget(Every.parse("2 epochs"), 9, phases=2).before(3, None) == (8, None)
    assert RoundBudget(Every.parse(5), 9).before(3, 4) == (2, 10)
    assert RoundBudget(Every.parse(5), 9).before(3, None) == (None, 10)


def test_rounds_of_steps_do_not_drift_where_a_batch_makes_two() -> None:
    every, ends = Every.parse(3), []
    progress = Progress.at(1, 0, every)
    for steps in range(0, 12, 2):
        progress.steps = steps + 2
        if progress.complete(every):
            ends.append(progress.steps)
            progress = progress.next(progress.round + 1, every)
    assert ends == [4, 6, 10, 12]


def test_a_second_phase_is_not_the_beginning_of_its_round() -> None:
    every = Every.parse("epoch")
    progress = Progress.at(4, 8, every)
    assert progress.at_beginning
    progress.batch_ended(last_of_epoch=True)
    assert progress.complete(every) and not progress.at_beginning
    second = progress.next(4, every)
    assert (second.round, second.phase, second.epochs) == (4, 1, 0) and not second.at_beginning
    assert second.next(5, every).at_beginning


def test_tally_gives_the_mean_loss_and_the_weight_of_the_round() -> None:
    tally = Tally()
    assert tally.mean_loss() == {} and tally.num_examples() == 1
    for loss in (torch.tensor(1.0, dtype=torch.bfloat16), None, torch.tensor(2.0)):
        tally.add_loss(loss)
        tally.rows += 4
    assert tally.mean_loss() == {"train_loss": 1.5} and tally.mean_loss(2) == {"train_loss": 3.0}
    assert tally.num_examples() == 12 and Tally(7).num_examples() == 7
    tally.add_loss(float("nan"))
    assert math.isnan(tally.mean_loss()["train_loss"])
    tally.reset()
    assert tally.mean_loss() == {} and tally.num_examples() == 1


def test_examples_of_loaders_and_batches() -> None:
    loader = DataLoader(TensorDataset(torch.ones(10, 2)), batch_size=4)
    assert [size_of(loader, batches, 1) for batches in (1, 2, 3, float("inf"))] == [4, 8, 10, 10]
    assert size_of(loader, 1, 2) == 8 and size_of(object(), 1, 1) is None
    assert rows_of({"x": [torch.ones(3, 2)], "name": "a"}) == 3 and rows_of("nothing") == 1


def test_schedules_are_moved_and_warned_about() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.5, total_iters=5)
    advance_schedule(schedule, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="ends after 5 of the 6 epochs"):
        warn_if_schedule_ends_early(schedule, 6, "epochs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_schedule_ends_early(schedule, 6, "epochs", frequency=2)
        warn_if_schedule_ends_early(schedule, None, "epochs")
