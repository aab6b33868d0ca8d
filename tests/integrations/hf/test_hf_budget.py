"""Rounds x `every` in the trainer's own loop, with hooks and a real server; one site, so that nothing waits."""

from __future__ import annotations

import hf_models as m
import pytest
import torch
from transformers import TrainerCallback

from fl_adapters.hf import FederatedCallback
from fl_runtime.errors import ConfigError


class Rates(TrainerCallback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_: object, **trained: object) -> None:
        self.seen.append(trained["optimizer"].param_groups[0]["lr"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("every", "budget", "steps"),
    [
        ("epoch", {"num_train_epochs": 1}, 12),  # lengthened
        ("epoch", {"num_train_epochs": 9}, 12),  # shortened
        ("2 epochs", {"max_steps": 3}, 24),
        (5, {"num_train_epochs": 1}, 15),
        (5, {"max_steps": 100}, 15),
    ],
)
def test_trainer_runs_exactly_rounds_times_every(federation, every, budget, steps) -> None:
    run = federation(rounds=3, every=every)
    rates = Rates()
    trainer = m.trainer(FederatedCallback(kit=run.kit()), callbacks=[rates], **budget)
    trainer.train()
    assert len(run.ended().rounds) == 3
    assert trainer.state.global_step == steps
    # one linear schedule over all rounds
    assert rates.seen == pytest.approx([1e-2 * (1 - i / steps) for i in range(steps)])


@pytest.mark.parametrize(
    ("every", "budget", "said"),
    [
        ("epoch", {"num_train_epochs": 2}, "the job's 3 rounds of 1 epoch replace num_train_epochs=2\n"),
        (2, {"max_steps": 8}, "the job's 3 rounds of 2 steps replace max_steps=8\n"),
        ("epoch", {"num_train_epochs": 3}, None),
        (2, {"max_steps": 6}, None),
    ],
)
def test_a_length_that_the_job_replaces_is_said_once(federation, capfd, every, budget, said) -> None:
    m.trainer(FederatedCallback(kit=federation(rounds=3, every=every).kit()), **budget).train()
    assert [line for line in capfd.readouterr().err.splitlines(True) if "replace" in line] == (
        [f"fl-adapters: {said}"] if said else []
    )


def test_script_argument_wins_over_the_job(federation) -> None:
    run = federation(rounds=2, every="epoch")
    trainer = m.trainer(FederatedCallback(kit=run.kit(), every=3))
    trainer.train()
    assert trainer.state.global_step == 6
    assert [e.data["local_steps"] for e in run.events_of("update")] == [3, 3]


def test_rounds_are_counted_in_optimizer_steps_under_gradient_accumulation(federation) -> None:
    run = federation(rounds=2, every=3)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), gradient_accumulation_steps=2)  # 2 optimizer steps an epoch
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.epoch == pytest.approx(3)
    assert len(run.ended().rounds) == 2


def test_epoch_with_an_incomplete_last_accumulation(federation) -> None:
    run = federation(rounds=2)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), gradient_accumulation_steps=3)  # 4 batches: 3 + 1
    trainer.train()
    assert trainer.state.global_step == 4 and len(run.ended().rounds) == 2


@pytest.mark.parametrize(
    ("every", "budget", "rounds", "local_steps"),
    [
        ("epoch", {"num_train_epochs": 2}, 2, [4, 4]),
        ("epoch", {"num_train_epochs": 2.5}, 3, [4, 4, 2]),
        (3, {"max_steps": 8}, 3, [3, 3, 2]),
        ("2 epochs", {"max_steps": 10}, 2, [8, 2]),
    ],
)
def test_without_rounds_the_trainer_decides(federation, every, budget, rounds, local_steps) -> None:
    run = federation(rounds=None, every=every)
    m.trainer(FederatedCallback(kit=run.kit()), **budget).train()
    assert len(run.ended().rounds) == rounds
    assert [e.data["local_steps"] for e in run.events_of("update")] == local_steps


def test_added_after_the_constructor_it_must_fit_already(federation) -> None:
    run = federation(rounds=3)
    trainer = m.trainer(num_train_epochs=1)
    trainer.add_callback(FederatedCallback(kit=run.kit()))
    with pytest.raises(ConfigError, match="num_train_epochs=3"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert run.events_of("left")  # at once: the others need not wait for the end of the process


@pytest.mark.parametrize(("every", "value"), [(5, "max_steps=15"), ("2 epochs", "num_train_epochs=6")])
def test_the_error_names_the_value_in_the_terms_of_every(federation, every, value) -> None:
    run = federation(rounds=3, every=every)
    trainer = m.trainer()
    trainer.add_callback(FederatedCallback(kit=run.kit()))
    with pytest.raises(ConfigError, match=value):
        trainer.train()


def test_added_after_the_constructor_with_the_right_length(federation) -> None:
    run = federation(rounds=3)
    trainer = m.trainer(num_train_epochs=3)
    trainer.add_callback(FederatedCallback(kit=run.kit()))
    trainer.train()
    assert len(run.ended().rounds) == 3


def test_data_without_a_length_counts_the_examples_of_the_round(federation) -> None:
    run = federation(rounds=2, every=3)
    m.trainer(FederatedCallback(kit=run.kit()), train_dataset=m.Endless(), max_steps=1).train()
    assert [e.data["num_examples"] for e in run.events_of("update")] == [24, 24]


def test_epochs_of_data_without_a_length_are_refused(federation) -> None:
    run = federation(rounds=2, every="epoch")
    with pytest.raises(ConfigError, match="needs a training set with a length"):
        m.trainer(FederatedCallback(kit=run.kit()), train_dataset=m.Endless(), max_steps=1).train()


@pytest.mark.parametrize(("given", "sent"), [(None, 32), (7, 7)])
def test_num_examples_is_the_training_set_or_the_argument(federation, given, sent) -> None:
    run = federation(rounds=1)
    m.trainer(FederatedCallback(kit=run.kit(), num_examples=given)).train()
    assert [e.data["num_examples"] for e in run.events_of("update")] == [sent]


@pytest.mark.parametrize("number", [0, -3, 2.5])
def test_num_examples_must_be_positive(number) -> None:
    with pytest.raises(ConfigError, match="num_examples"):
        FederatedCallback(num_examples=number)


def test_schedule_of_the_user_with_a_short_horizon_is_kept_and_warned_about(federation) -> None:
    run = federation(rounds=3)
    model = m.adapted(m.classifier())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    with pytest.warns(UserWarning, match="ends after 4 of the 12"):
        m.trainer(FederatedCallback(kit=run.kit()), model=model, optimizers=(optimizer, schedule)).train()


def test_epoch_that_another_callback_cuts_short_still_ends_its_round(federation) -> None:
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **_: object) -> None:
            control.should_epoch_stop = state.global_step == 2

    run = federation(rounds=2)
    m.trainer(FederatedCallback(kit=run.kit()), callbacks=[Cut()]).train()
    assert [e.data["local_steps"] for e in run.events_of("update")] == [2, 4]
    assert len(run.ended().rounds) == 2
