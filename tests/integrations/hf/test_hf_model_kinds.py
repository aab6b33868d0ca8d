"""Kinds of models and trainers that users bring: one round each, beside a second site that changes the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hf_models as m
import numpy as np
import peft
import pytest
import st_models as st
import torch
from safetensors.torch import load_model
from torch import nn

from fl_adapters.hf import FederatedCallback
from fl_adapters.hf.trainer import refuse_unsupported
from fl_adapters.participant.options import Every, SiteSettings
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError


class Plain(nn.Module):
    """A module outside transformers, with batch normalization, whose counter is an integer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.norm(input_ids.float()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def halved(_round: int, arrays):
    return {name: array / 2 if array.dtype.kind == "f" else array + 100 for name, array in arrays.items()}


def one_round(federation, model, twin, **given: Any):
    """Train `model` beside a partner that has `twin`; both must end with the same weights."""
    run = federation(sites=2, rounds=1)
    partner = run.partner(twin, halved)
    trainer = m.trainer(FederatedCallback(kit=run.kit()), model=model, **given)
    trainer.train()
    partner.ended()
    run.ended()
    final = TorchState(trainer.model).get_state()
    assert list(final) == list(partner.received[-1])
    assert all(np.array_equal(final[n], partner.received[-1][n]) for n in final)
    return run, trainer


def test_plain_module_with_batch_norm(federation) -> None:
    model = Plain()
    run, _ = one_round(federation, model, Plain())
    assert model.norm.num_batches_tracked == 100  # counters are not averaged: the maximum
    opened = Plain()
    load_model(opened, run.folder / "model" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


def test_adapter_added_by_transformers_itself(federation) -> None:
    def adapted() -> nn.Module:
        model = m.decoder()
        torch.manual_seed(1)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model

    run, trainer = one_round(federation, adapted(), adapted(), train_dataset=m.Sentences(32))
    assert (run.folder / "model" / "adapter_model.safetensors").exists()
    assert all("lora" in name for name in TorchState(trainer.model).tensors)


def test_prompt_tuning(federation) -> None:
    def prompted() -> nn.Module:
        torch.manual_seed(1)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(m.decoder(), config)

    run, trainer = one_round(federation, prompted(), prompted(), train_dataset=m.Sentences(32))
    opened = peft.PeftModel.from_pretrained(m.decoder(), run.folder / "model")
    same = opened.prompt_encoder["default"].embedding.weight == trainer.model.prompt_encoder["default"].embedding.weight
    assert same.all()


def test_compiled_model(federation) -> None:
    one_round(federation, m.classifier(), m.classifier(), torch_compile=True, torch_compile_backend="eager")


def test_model_that_the_trainer_makes_itself(federation) -> None:
    run = federation(rounds=1)
    trainer = m.Trainer(
        model_init=lambda: m.classifier(),
        args=m.arguments(),
        train_dataset=m.Tokens(32),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    trainer.train()
    assert len(run.ended().rounds) == 1


class ScaledLoss(nn.Module):
    """A loss with a parameter of its own, which the trainer's optimizer trains too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"] * self.scale, labels)


def test_parameters_of_a_loss_travel_with_the_model(federation) -> None:
    run = federation(sites=2, rounds=2)
    loss = ScaledLoss()
    beside = {"compute_loss_func.scale": ScaledLoss().scale}
    partner = run.partner(m.classifier(), halved, beside=beside)
    model = m.classifier()
    trainer = m.Trainer(
        model=model,
        args=m.arguments(),
        train_dataset=m.Tokens(32),
        compute_loss_func=loss,
        optimizers=(torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1), None),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    trainer.train()
    partner.ended()
    run.ended()
    assert loss.scale.item() == partner.received[-1]["compute_loss_func.scale"].item()
    assert loss.scale.item() not in (1.0, 0.5)


def test_classifier_of_a_softmax_loss_travels_unless_it_is_kept_local(federation, tmp_path) -> None:
    package, datasets = pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    losses = pytest.importorskip("sentence_transformers.losses")
    heads = {}
    for keep_local in ((), ("loss.*",)):
        run = federation(rounds=1)
        model = package.SentenceTransformer(st.base(tmp_path / f"base-{len(heads)}"), device="cpu")
        loss = losses.SoftmaxLoss(model, 16, num_labels=2)
        package.SentenceTransformerTrainer(
            model=model,
            args=package.SentenceTransformerTrainingArguments("out", use_cpu=True, report_to=[], save_strategy="no"),
            train_dataset=datasets.Dataset.from_dict(st.pairs()),
            loss=loss,
            callbacks=[FederatedCallback(kit=run.kit(), keep_local=keep_local)],
        ).train()
        run.ended()
        heads[keep_local] = {name: array for name, array in run.model().items() if name.startswith("loss.")}
        if not keep_local:
            assert np.array_equal(heads[()]["loss.classifier.weight"], loss.classifier.weight.detach().numpy())
    assert [sorted(found) for found in heads.values()] == [["loss.classifier.bias", "loss.classifier.weight"], []]


def test_patterns_choose_layers(federation) -> None:
    run = federation(rounds=1)
    m.trainer(FederatedCallback(kit=run.kit(), exchange=["classifier.*"]), model=m.classifier()).train()
    run.ended()
    assert sorted(run.model()) == ["classifier.bias", "classifier.weight"]


def test_pattern_without_a_match_is_refused_before_the_first_step(federation) -> None:
    trainer = m.trainer(FederatedCallback(kit=federation().kit(), keep_local=["clasifier.*"]), model=m.classifier())
    with pytest.raises(ConfigError, match=r"clasifier\.\*"):
        trainer.train()
    assert trainer.state.global_step == 0


FSDP1 = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed keeps master copies"),
        ({"is_fsdp_enabled": True, "accelerator": FSDP1}, "FSDP1 puts the parameters"),
        ({"model": SimpleNamespace(_tp_size=2)}, "tensor parallelism"),
    ],
)
def test_what_has_not_been_tested_is_refused_with_the_reason(feature, reason) -> None:
    """None of these runs on a CPU, so a stand-in reports what the Trainer would."""
    stand_in = SimpleNamespace(
        **{"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "model": None, "args": m.arguments(), **feature}
    )
    settings = SiteSettings.resolve(FederatedCallback().options, {})
    assert settings.every == Every(epochs=1)
    with pytest.raises(ConfigError, match=reason):
        refuse_unsupported(stand_in, settings)


def test_data_sets_that_setfit_gives_later_are_not_missed_in_the_constructor() -> None:
    """As in SetFit's README: its trainer has load_best_model_at_end, and no data before it trains."""
    trainer = m.trainer(train_dataset=None)
    trainer.setfit_model = trainer.model
    trainer.args.load_best_model_at_end = True
    settings = SiteSettings.resolve(FederatedCallback().options, {})
    refuse_unsupported(trainer, settings)
    trainer.train_dataset = m.Tokens(8)
    with pytest.raises(ConfigError, match="no round is scored"):
        refuse_unsupported(trainer, settings)
