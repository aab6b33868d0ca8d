"""Small random models and data, made in code; the same seed gives the same ones at every site."""

from __future__ import annotations

from typing import Any

import peft
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 32


class Tokens(torch.utils.data.Dataset[dict[str, Any]]):
    """`size` rows of 8 tokens with a label that can be learned; `seed` draws other rows."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(2, VOCABULARY, (size, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": int(tokens[0] > VOCABULARY // 2)}


class Sentences(Tokens):
    """The rows of `Tokens` as samples for a language model."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.tokens[index].clone()
        labels[0] = -100  # nothing predicts it; transformers 4 would count it nevertheless
        return {"input_ids": self.tokens[index], "labels": labels}


class Endless(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A dataset of rows without a length."""

    def __iter__(self) -> Any:
        rows, index = Tokens(64), 0
        while True:
            yield rows[index % 64]
            index += 1


def classifier(dropout: float = 0.0, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def decoder(dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            attention_dropout=dropout,
        )
    )


def adapted(model: nn.Module, method: str = "lora", *, r: int = 2, seed: int = 1, **options: Any) -> nn.Module:
    """Return `model` under a PEFT adapter whose two factors are both random."""
    torch.manual_seed(seed)
    decodes = isinstance(model, LlamaForCausalLM)
    target = ["q_proj", "v_proj"] if decodes else ["query", "value"]
    task = None if decodes else "SEQ_CLS"
    if method == "ia3":
        config = peft.IA3Config(target_modules=target, feedforward_modules=[], task_type=task, **options)
    else:
        options = {"use_dora": True, **options} if method == "dora" else options
        config = peft.LoraConfig(r=r, target_modules=target, task_type=task, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def arguments(**changed: Any) -> TrainingArguments:
    """Return quiet TrainingArguments for the CPU, with 8 rows per step."""
    fields: dict[str, Any] = {
        "output_dir": "out",
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **changed,
    }
    return TrainingArguments(**fields)


def shard_by_accelerate(trainer: Trainer) -> None:
    """Let accelerate shard the model by FSDP2, as `fsdp_version: 2` does. It does so by itself on several GPUs only."""
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def trainer(callback: Any = None, **given: Any) -> Trainer:
    """Return a Trainer over 32 rows, 4 steps an epoch. Names of TrainingArguments in `given` are passed on."""
    own = ("model", "train_dataset", "eval_dataset", "compute_metrics", "optimizers", "callbacks", "processing_class")
    fields: dict[str, Any] = {"train_dataset": Tokens(32), **{k: given.pop(k) for k in own if k in given}}
    fields["model"] = fields.get("model") or adapted(classifier())
    fields["callbacks"] = [*([callback] if callback else []), *fields.get("callbacks", [])]
    return Trainer(args=arguments(**given), **fields)


class InOrder(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows of `data` in order, never shuffled, with a length."""

    def __init__(self, data: Tokens) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (self.data[i] for i in range(len(self.data)))

    def __len__(self) -> int:
        return len(self.data)


def to_compare(lora: bool, dropout: float) -> tuple[nn.Module, type[Tokens]]:
    """Return a model and its kind of data, in which no gradient is zero up to rounding.

    Adam would amplify such rounding errors. BERT's key biases have gradients like that, so BERT is used with LoRA only.
    """
    return (adapted(classifier(dropout)), Tokens) if lora else (decoder(dropout), Sentences)
