"""What the model, `model/` and `best/` hold when `train()` has returned."""

from __future__ import annotations

import hf_models as m
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from fl_adapters.hf import FederatedCallback


class Normalised(nn.Module):
    """A module with batch normalization, whose statistics a forward pass in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(input_ids.float()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Sampler(TrainerCallback):
    """Puts rows through the model in training mode when epochs and the training have ended: new statistics."""

    def on_epoch_end(self, args, state, control, model=None, **_: object) -> None:
        model.train()
        model(torch.full((8, 8), 50), torch.zeros(8, dtype=torch.long))

    on_train_end = on_epoch_end


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("keep_local", [(), ("norm.*",)], ids=["all travels", "statistics stay"])
def test_statistics_changed_after_the_last_exchange_are_put_back(federation, first: bool, keep_local) -> None:
    run = federation(rounds=2)
    ours, sampler = FederatedCallback(kit=run.kit(), keep_local=keep_local), Sampler()
    trainer = m.trainer(model=Normalised(), callbacks=[ours, sampler] if first else [sampler, ours])
    trainer.train()
    run.ended()
    exported = load_file(run.folder / "model" / "model.safetensors")
    final = {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}
    assert final.keys() == exported.keys()
    assert all(np.array_equal(final[name], exported[name]) for name in final)
    assert all(np.array_equal(final[name], array) for name, array in run.model().items())
    assert not any(type(callback).__module__.startswith("fl_adapters.hf.trainer") for callback in callbacks(trainer))


def callbacks(trainer):
    return trainer.callback_handler.callbacks


def test_best_model_is_written_by_a_site_without_validation_data(federation) -> None:
    run = federation(sites=2, rounds=2)
    losses = iter([0.1, 0.2, 0.3])
    partner = run.partner(m.classifier(), lambda _, a: {n: x / 2 for n, x in a.items()}, score=lambda: next(losses))
    m.trainer(FederatedCallback(kit=run.kit()), model=m.classifier()).train()
    partner.ended()
    run.ended()
    best, final = (opened(run.folder / folder) for folder in ("best", "model"))
    wanted = run.model("best")
    assert all(np.array_equal(best[name], array) for name, array in wanted.items())
    assert any(not np.array_equal(best[name], final[name]) for name in wanted)


def opened(folder):
    """The weights that transformers loads from `folder`, copied out of the file."""
    model = BertForSequenceClassification.from_pretrained(folder)
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
