"""Corrected gradients and personal models under `Trainer`, compared with a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hf_example
import pytest
import torch
from hf_example import Example
from safetensors.numpy import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from fl_adapters import site
from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import CorrectionCase, LocalFederation, correction_cases
from fl_adapters.testing.conformance.adapter import require_same_bits
from fl_runtime.errors import ConfigError
from fl_runtime.store.tensorfile import read_tensors

OPTIONS = {
    "adam": {},
    "sgd": {"kind": "sgd"},
    "accumulating": {"kind": "sgd", "accumulate": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, options: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    case(Example(str(tmp_path_factory.mktemp("alone")), **options))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalFederation]]:
    """start(strategy="ditto", ...) starts a federation of one site in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(LocalFederation(sites=1, folder=tmp_path / "run", **settings))


def made_trainer(kit: str, *, rate: float = 0.05, callbacks: tuple[TrainerCallback, ...] = ()) -> Trainer:
    options = TrainingArguments(
        output_dir="out", learning_rate=rate, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    net, given = hf_example.made(0), [FederatedCallback(kit=kit), *callbacks]
    return Trainer(net, options, train_dataset=hf_example.rows_of(0), callbacks=given)


def test_the_personal_model_opens_with_safetensors(start: Any) -> None:
    run = start(rounds=2, strategy="ditto", every=2)
    kit = run.places[0].kit
    trainer = made_trainer(kit)
    trainer.train()
    folder = site(kit).personal
    assert folder is not None and folder == run.folder / "sites" / "site-1" / "personal"
    kept = read_tensors(folder.parent / "personal.safetensors")
    opened = load_file(folder / "model.safetensors")
    require_same_bits({name: opened[name] for name in kept}, kept)
    require_same_bits(hf_example.weights(trainer.model), run.model())
    training = [event.data["metrics"] for event in run.events if event.kind == "update"]
    assert [sorted(metrics) for metrics in training] == [["train_loss", "train_personal_loss"]] * 2


class Interrupts(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def test_another_process_goes_on_with_the_personal_model(start: Any) -> None:
    run = start(rounds=3, strategy="ditto", every=2)
    file = run.folder / "sites" / "site-1" / "personal.safetensors"
    with pytest.raises(KeyboardInterrupt):  # in the global phase of round 2
        made_trainer(run.places[0].kit, callbacks=(Interrupts(5),)).train()
    kept = {name: array.copy() for name, array in read_tensors(file).items()}
    made_trainer(run.places[0].kit, rate=0.0).train()
    assert [result.round for result in run.result().rounds] == [1, 2, 3]
    require_same_bits(read_tensors(file), kept)  # trained on, at a rate of zero


def test_a_training_that_was_interrupted_leaves_no_correction_behind(start: Any) -> None:
    """The trainer's optimizer is corrected once per step, and never outside a federation."""
    run = start(rounds=3, strategy="fedprox:mu=0.5", every=2)
    trainer = made_trainer(run.places[0].kit, callbacks=(Interrupts(3),))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupts)
    trainer.train()
    assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == 0


def test_an_optimizer_that_gradients_pass_by_is_refused(start: Any) -> None:
    """Some optimizers step layer by layer while gradients are computed."""
    run = start(rounds=2, strategy="fedprox", every=2)
    trainer = made_trainer(run.places[0].kit)
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="no gradient of this round"):
        trainer.train()
