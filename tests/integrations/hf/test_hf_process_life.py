"""Life in a user's trainer process: data workers, copies of the callback, cells run twice, and sites that die."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import hf_models as m
import numpy as np
import pytest
from transformers import TrainerCallback

from fl_adapters.hf import FederatedCallback
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError

WORKERS = """
import os
import torch
import hf_models as m
from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session

class Data(m.Tokens):
    def __getitem__(self, index):
        if VALUES["start"] == "fork":  # a child has the parent's memory, but no part in its session
            assert os.getpid() != PARENT and open_session(Options(), framework="a worker") is None
        return super().__getitem__(index)

PARENT = os.getpid()
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(VALUES["start"], force=True)
    data = m.Tokens(32) if VALUES["start"] == "spawn" else Data(32)
    trainer = m.trainer(
        FederatedCallback(), train_dataset=data, dataloader_num_workers=VALUES["workers"],
        eval_dataset=data if VALUES["start"] == "fork" else None,  # a spawned worker takes seconds to import torch
        dataloader_persistent_workers=VALUES["persistent"],
    )
    trainer.train()
    RESULT = trainer.state.global_step
"""


@pytest.mark.parametrize(
    ("start", "persistent", "workers"), [("fork", False, 2), ("fork", True, 2), ("spawn", True, 1)]
)
def test_data_loader_workers(federation, start, persistent, workers) -> None:
    run = federation(rounds=2)
    values = {"start": start, "persistent": persistent, "workers": workers}
    assert run.fork(WORKERS, values).result() == 8
    assert len(run.ended().rounds) == 2
    assert len(run.events_of("joined")) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_copy_takes_the_place_of_the_callback(federation, duplicate) -> None:
    run = federation(rounds=2)
    callback = FederatedCallback(kit=run.kit())
    trainer = m.trainer(callback)
    trainer.remove_callback(callback)
    trainer.add_callback(duplicate(callback))
    trainer.train()
    assert len(run.ended().rounds) == 2 and len(run.events_of("joined")) == 1


def test_copy_made_in_the_middle_of_a_run_leaves_the_model_alone(federation) -> None:
    run = federation(rounds=1)
    callback = FederatedCallback(kit=run.kit())
    copies = []

    class Copier(TrainerCallback):
        def on_step_end(self, args, state, control, **_: object) -> None:
            copies.append(copy.deepcopy(callback))

    m.trainer(callback, callbacks=[Copier()]).train()
    assert all(len(pickle.dumps(one)) < 4_000 for one in copies)
    assert len(run.ended().rounds) == 1


class Stop(TrainerCallback):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_: object) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_notebook_cell_run_twice_joins_again(federation) -> None:
    run = federation(rounds=3)

    def cell(*callbacks: TrainerCallback) -> object:
        model = m.adapted(m.classifier())
        trainer = m.trainer(FederatedCallback(kit=run.kit()), model=model, callbacks=list(callbacks))
        trainer.train()
        return trainer

    with pytest.raises(KeyboardInterrupt):
        cell(Stop(6))  # in round 2
    trainer = cell()
    result = run.ended()
    assert len(result.rounds) == 3
    assert [e.data["attempt"] for e in run.events_of("joined")] == [1, 2]
    assert trainer.state.global_step == 8  # rounds 2 and 3, no more


def test_finished_cell_run_again_has_the_final_model(federation) -> None:
    run = federation(rounds=2)
    first, second = m.adapted(m.classifier()), m.adapted(m.classifier())
    m.trainer(FederatedCallback(kit=run.kit()), model=first).train()
    run.ended()
    trainer = m.trainer(FederatedCallback(kit=run.kit()), model=second)
    trainer.train()
    assert trainer.state.global_step <= 1  # HF makes a step before it looks whether to stop; it is taken back
    assert all(np.array_equal(a, b) for a, b in zip(state(first), state(second), strict=True))


def state(model) -> list:
    return list(TorchState(model).get_state().values())


# --- checkpoints ------------------------------------------------------------------------------------------------

SITE = """
import os
import torch
from transformers import TrainerCallback
import hf_models as m
from fl_adapters.hf import FederatedCallback

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == VALUES["dies_at"]:
            os._exit(9)

torch.set_num_threads(1)
rates = []
class Rates(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        rates.append(optimizer.param_groups[0]["lr"])

model = m.adapted(m.classifier(dropout=0.1))
trainer = m.trainer(FederatedCallback(), model=model, callbacks=[Die(), Rates()], **VALUES["arguments"])
trainer.train(resume_from_checkpoint=VALUES["resume"])
RESULT = trainer.state.global_step, rates, {n: p.detach().numpy() for n, p in model.named_parameters() if "lora" in n}
"""


def halved(_round: int, arrays):
    return {name: array / 2 for name, array in arrays.items()}


def whole(federation, **arguments):
    """Run to the end without any interruption, and return the site's result."""
    run = federation(sites=2, rounds=3)
    partner = run.partner(m.adapted(m.classifier(0.1)), halved)
    result = run.fork(SITE, {"dies_at": None, "resume": None, "arguments": arguments}).result()
    partner.ended()
    return result


def interrupted(federation, dies_at: int, resume: bool | None, **arguments):
    run = federation(sites=2, rounds=3)
    partner = run.partner(m.adapted(m.classifier(0.1)), halved)
    values = {"dies_at": dies_at, "resume": None, "arguments": arguments}
    dead = run.fork(SITE, values)
    dead.process.join(60)
    assert dead.process.exitcode == 9, dead.log.read_text()
    again = run.fork(SITE, {**values, "dies_at": None, "resume": resume})
    result = again.result()
    partner.ended()
    assert len(run.ended().rounds) == 3
    return result, again.log.read_text()


@pytest.mark.parametrize(
    ("dies_at", "arguments"),
    [
        (6, {"save_strategy": "epoch"}),  # goes on from the start of round 2
        (7, {"save_strategy": "steps", "save_steps": 2}),  # goes on in the middle of round 2
        (8, {"save_strategy": "epoch"}),  # dies when it has the weights of round 3, before it has saved them
    ],
)
def test_resumed_run_ends_as_if_nothing_had_happened(federation, dies_at, arguments) -> None:
    steps, rates, expected = whole(federation, **arguments)
    (resumed_steps, resumed_rates, weights), _ = interrupted(federation, dies_at, True, **arguments)
    assert steps == 12
    if dies_at == 8:  # a round behind: its optimizer is older, its schedule is not
        assert resumed_steps == 8 and resumed_rates == rates[8:]
        return
    assert resumed_steps == steps and resumed_rates == rates[-len(resumed_rates) :]
    assert all(np.array_equal(weights[n], expected[n]) for n in expected)


def test_restart_without_a_checkpoint_takes_the_rounds_that_are_left(federation) -> None:
    _, rates, _ = whole(federation)
    (steps, rates_left, _), log = interrupted(federation, 6, None)
    assert steps == 8 and rates_left == pytest.approx(rates[4:])
    assert "4 steps behind round 2" in log


def test_checkpoint_of_another_run_is_refused(federation) -> None:
    run = federation(name="first", rounds=1)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), save_strategy="epoch")
    trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-4").resolve()
    assert checkpoint.is_dir()
    second = federation(name="second", rounds=2)
    with pytest.raises(ConfigError, match="'first'.*'second'"):
        m.trainer(FederatedCallback(kit=second.kit())).train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_ahead_of_the_federation_is_refused(federation) -> None:
    run = federation(rounds=1)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), save_strategy="epoch")
    trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-4").resolve()
    anew = federation(rounds=2)  # a job of the same name, begun anew
    with pytest.raises(ConfigError, match="is of round 2, but the federation is in round 1"):
        m.trainer(FederatedCallback(kit=anew.kit())).train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_without_a_federation_is_refused(federation) -> None:
    alone = m.trainer(save_strategy="epoch")
    alone.train()
    checkpoint = Path(alone.args.output_dir, "checkpoint-4").resolve()
    with pytest.raises(ConfigError, match="of no federated run"):
        m.trainer(FederatedCallback(kit=federation(rounds=2).kit())).train(resume_from_checkpoint=str(checkpoint))


def test_error_in_the_users_code_ends_the_site_and_not_the_run(federation) -> None:
    run = federation(sites=2, rounds=3, min_sites=1)
    partner = run.partner(m.adapted(m.classifier(0.1)))
    program = SITE.replace("os._exit(9)", "raise ValueError('a bug of the user')")
    site = run.fork(program, {"dies_at": 6, "resume": None, "arguments": {}})
    assert "a bug of the user" in site.error()
    partner.ended()
    assert len(run.ended().rounds) == 3


def test_second_training_in_one_process(federation) -> None:
    """A script that trains twice, each time in another federation."""
    for _ in range(2):
        run = federation(rounds=1)
        m.trainer(FederatedCallback(kit=run.kit())).train()
        assert len(run.ended().rounds) == 1
