"""The SFTTrainer of `trl`, which is a Trainer with metrics of its own in the log."""

from __future__ import annotations

import hf_models as m
import peft
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fl_adapters.hf import FederatedCallback

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


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
