"""`exact_restart` with `Trainer`: sites that die end with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models as m
import pytest
from hf_example import Example, made, rows_of, weights
from killed_sites import WarmProcess, run_sites
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import RestartCase, Trained, restart_cases
from fl_runtime.errors import ConfigError

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from hf_example import Example
from fl_adapters import site
Example("alone").train(site().index, epochs=100, keep_local=["head.*"])
"""


@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_the_callback_restarts_exactly(case: RestartCase, tmp_path_factory: pytest.TempPathFactory) -> None:
    case(Example(str(tmp_path_factory.mktemp("alone"))))


@pytest.mark.parametrize("strategy", ["scaffold", "ditto:lam=0.1", "fedprox:mu=0.1"])
def test_with_what_a_strategy_keeps_at_the_site(strategy: str, tmp_path: Path) -> None:
    for case in restart_cases(strategy=strategy)[-1:]:
        case(Example(str(tmp_path), kind="sgd" if strategy == "scaffold" else "adam"))


class Lora(Example):
    """The training job of a transformer under LoRA."""

    steps_per_epoch, personal = 4, ""

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        set_seed(site)
        model = m.adapted(m.classifier(0.1))
        m.trainer(FederatedCallback(**arguments), model=model, num_train_epochs=epochs, seed=site).train()
        return Trained(weights(model), 0)


@pytest.mark.parametrize("strategy", ["flora", "ffa-lora"])
def test_lora(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base weights follow the global factors, or a factor stays fixed meanwhile."""
    monkeypatch.chdir(tmp_path)
    restart_cases(strategy=strategy)[-1](Lora(str(tmp_path)))


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """SIGKILL, with AdamW, a falling learning rate, dropout, shuffling, and a layer that stays at the site."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(m.__file__).parent)))
    with WarmProcess("torch", "transformers.trainer") as warm:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=warm, rounds=6)
        assert run_sites(tmp_path / "disturbed", script, warm=warm, kills=5, seed=4, rounds=6) == wanted


def refused(run: Any, trainer: Any = m.trainer, resume: Any = None, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer(FederatedCallback(kit=run.kit()), **options).train(resume_from_checkpoint=resume)
    assert not run.events_of("round_started")
    return str(caught.value)


def test_what_cannot_be_exact_is_refused_before_round_1(federation) -> None:
    def run(**settings: Any) -> Any:
        return federation(rounds=2, exact_restart=True, **settings)

    scored = {"eval_strategy": "epoch", "eval_dataset": m.Tokens(8)}
    assert "a budget in steps" in refused(run(every=2))
    assert "follows a metric" in refused(run(), lr_scheduler_type="reduce_lr_on_plateau", **scored)
    workers: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    assert "persistent_workers=False" in refused(run(), **workers)

    class Order(SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            raise NotImplementedError

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            rows = rows_of(0)
            return self.accelerator.prepare(DataLoader(rows, sampler=Order(rows)))

    def own(callback: FederatedCallback) -> Trainer:
        return Own(
            made(0), TrainingArguments(use_cpu=True, report_to=[]), train_dataset=rows_of(0), callbacks=[callback]
        )

    assert "Order has an order of HF's own count" in refused(run(), own)


def test_a_site_that_comes_back_scores_the_model_that_it_had_not(federation) -> None:
    """So the best round is that of an undisturbed run."""
    run = federation(sites=1, rounds=3, exact_restart=True)
    program = """
import hf_models as m, os
from fl_adapters.hf import FederatedCallback
callback = FederatedCallback()
report, reports = FederatedCallback.on_evaluate, []
def dying(self, args, state, *rest, **more):
    if VALUES and state.global_step == VALUES:
        os._exit(9)
    report(self, args, state, *rest, **more)
FederatedCallback.on_evaluate = dying
trainer = m.trainer(callback, eval_dataset=m.Tokens(8))
trainer.train()
RESULT = trainer.state.global_step, [round(row["epoch"], 6) for row in trainer.state.log_history if "eval_loss" in row]
"""
    dead = run.fork(program, 4)
    dead.process.join(60)
    assert dead.process.exitcode == 9, dead.log.read_text()
    steps, evaluated = run.fork(program).result()
    assert (steps, evaluated) == (12, [1.0, 2.0, 3.0])
    assert sorted({event.round for event in run.events_of("report")}) == [1, 2, 3]


WITHIN_A_ROUND = """
import os, signal
import hf_models as m, torch
from fl_adapters.hf import FederatedCallback
from transformers import TrainerCallback

class Masked(m.Tokens):  # draws random numbers, as a collator for masked language models does
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "input_ids": torch.where(torch.rand(8) < 0.2, 1, row["input_ids"])}

class Dies(TrainerCallback):
    steps = 0
    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        if VALUES[0] and state.global_step == VALUES[0]:
            os.kill(os.getpid(), signal.SIGKILL)

dies, options = Dies(), VALUES[1]
trainer = m.trainer(
    callbacks=[FederatedCallback(every="2 epochs", keep_local=["classifier.*"]), dies], model=m.classifier(0.2),
    train_dataset=Masked(48), per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
    eval_dataset=m.Tokens(8), **options)
trainer.train()
epochs = [row["epoch"] for row in trainer.state.log_history if "eval_loss" in row]
RESULT = dies.steps, trainer.state.global_step, epochs, {n: t.tolist() for n, t in trainer.model.state_dict().items()}
"""


@pytest.mark.parametrize(
    ("options", "per_round", "deaths"),
    [({}, 24, [5, 15, 41]), ({"gradient_accumulation_steps": 2}, 12, [9])],
    ids=["killed-three-times", "accumulating"],
)
def test_a_kill_in_the_middle_of_a_round_costs_the_steps_since_the_last_checkpoint(
    federation, options: dict[str, Any], per_round: int, deaths: list[int]
) -> None:
    """Killed with SIGKILL in an epoch's middle; the oracle is the same site, not disturbed."""
    quiet = federation(sites=1, rounds=2, exact_restart=True, seed=3).fork(WITHIN_A_ROUND, (0, options))
    _, total, epochs, expected = quiet.result()
    run = federation(sites=1, rounds=2, exact_restart=True, seed=3)
    for step in deaths:
        dead = run.fork(WITHIN_A_ROUND, (step, options))
        dead.process.join(60)
        assert dead.process.exitcode == -9, dead.log.read_text()
        assert "at most 2 steps" in dead.log.read_text()
    steps, reached, epochs_after, weights_after = run.fork(WITHIN_A_ROUND, (0, options)).result()
    assert (reached, total) == (2 * per_round, 2 * per_round)
    assert steps == total - (deaths[-1] - 1), "only the step after the last checkpoint is made again"
    assert epochs[-1:] == epochs_after[-1:]
    assert weights_after == expected


def test_without_checkpoints_within_a_round_the_cost_of_a_restart_is_told(federation, capfd) -> None:
    run = federation(sites=1, rounds=1, exact_restart=True)
    m.trainer(FederatedCallback(kit=run.kit())).train()
    assert "a restart repeats the round from its beginning" in capfd.readouterr().err
