"""TRL's trainers, used as in its own scripts: SFT with metrics of its own, DPO, reward models and GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models as m
import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits
from fl_runtime.errors import HandshakeError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PROMPT, GOOD, BAD = "w3 w4 w5", "w6 w7", "w8 w9"
ROWS: dict[str, dict[str, str]] = {
    "DPO": {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
    "Reward": {"chosen": f"{PROMPT} {GOOD}", "rejected": f"{PROMPT} {BAD}"},
    "GRPO": {"prompt": PROMPT},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, m.VOCABULARY))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def texts(rows: int) -> object:
    lines = [" ".join(f"w{int(t)}" for t in row) for row in m.Tokens(rows).tokens]
    return datasets.Dataset.from_dict({"text": lines})


def test_sft_trainer_with_an_adapter(federation) -> None:
    run = federation(rounds=2)
    arguments = trl.SFTConfig(
        output_dir="out",
        use_cpu=True,
        bf16=False,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        max_length=16,
        dataset_num_proc=None,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=m.decoder(),
        args=arguments,
        train_dataset=texts(32),
        eval_dataset=texts(8),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[FederatedCallback(kit=run.kit())],
    )
    trainer.train()
    run.ended()
    history = trainer.state.log_history
    assert [row["federation_round"] for row in history if "federation_round" in row] == [1, 2]
    own = [row for row in history if "loss" in row]
    assert [row["step"] for row in own] == [4, 8]
    # SFTTrainer's own metrics are in its own rows, over all the steps since the row before
    assert all("mean_token_accuracy" in row or "entropy" in row for row in own)
    assert all(not {"mean_token_accuracy", "entropy"} & set(row) for row in history if "federation_round" in row)
    assert len(run.events_of("report")) == 2
    opened = peft.PeftModel.from_pretrained(m.decoder(), run.folder / "model")
    assert opened.peft_config["default"].r == 2
    assert (run.folder / "model" / "tokenizer.json").exists()


def saved_model(folder: Path, kind: str = "", seed: int = 0) -> str:
    """Save a decoder with its tokenizer to `folder`, as a pretrained one would lie there; return the folder."""
    model = m.decoder(seed=seed)
    if kind == "Reward":
        model = LlamaForSequenceClassification(LlamaConfig(**{**model.config.to_dict(), "num_labels": 1}))
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(kind: str, size: int) -> Any:
    """`size` rows, no two of them equal."""
    return datasets.Dataset.from_list([{k: f"w{10 + i} {text}" for k, text in ROWS[kind].items()} for i in range(size)])


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


def trainer(kind: str, model: Any, folder: Path, size: int, **given: Any) -> Any:
    """Return the trainer as the script named after `kind` makes it."""
    fields: dict[str, Any] = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    fields |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    if kind == "GRPO":
        fields |= {"num_generations": 2, "max_completion_length": 4}
        given["reward_funcs"] = [length_reward]
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder), optim="sgd", **fields)
    return getattr(trl, f"{kind}Trainer")(model=model, args=config, train_dataset=rows(kind, size), **given)


def weights(made: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in made.model.named_parameters()}


@pytest.mark.parametrize("kind", ["DPO", "Reward", "GRPO"])
def test_trainers_of_trl_equal_their_mean_by_hand(kind: str, tmp_path: Path) -> None:
    model, sizes = saved_model(tmp_path / "model", kind), (8, 12)

    def train(place: Any) -> dict[str, np.ndarray]:
        callbacks = [FederatedCallback(kit=place.kit)]
        made = trainer(kind, model, tmp_path / place.name, sizes[place.index], callbacks=callbacks)
        made.train()
        return weights(made)

    states = [(torch.get_rng_state, torch.set_rng_state)]
    with LocalFederation(sites=2, rounds=1, states=states) as federation:
        sites = federation.run(train)
        exported = AutoModel.from_pretrained(federation.folder / "model")
    mean: dict[str, np.ndarray] = {}
    for size in sizes:
        alone = trainer(kind, model, tmp_path / "alone", size)
        before = weights(alone)
        alone.train()
        after = weights(alone)
        assert any(not np.array_equal(after[name], before[name]) for name in after)
        mean = {name: mean.get(name, 0) + after[name] * size / sum(sizes) for name in after}
    for reached in sites.values():
        require_close(reached, mean, 1e-6)
    require_same_bits(sites["site-1"], sites["site-2"])
    for name, tensor in exported.named_parameters():
        assert np.array_equal(tensor.detach().numpy(), sites["site-1"][f"model.{name}"])


def test_other_reference_models_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """The reference is part of the loss of DPO. It does not travel, so each site would train towards its own."""

    def train(place: Any) -> None:
        folder = saved_model(tmp_path / place.name, seed=place.index)
        models = {name: AutoModelForCausalLM.from_pretrained(folder) for name in ("model", "ref_model")}
        callbacks = [FederatedCallback(kit=place.kit)]
        made = trainer(
            "DPO",
            folder=tmp_path / f"out-{place.name}",
            size=8,
            processing_class=tokenizer(),
            callbacks=callbacks,
            **models,
        )
        try:
            made.train()
        finally:
            assert made.state.global_step == 0

    with (
        LocalFederation(sites=2, rounds=1, states=[]) as federation,
        pytest.raises(HandshakeError, match="reference model: .*these tensors differ: lm_head.weight"),
    ):
        federation.run(train)
