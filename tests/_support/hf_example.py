"""The conformance suite's training job: a tiny module with dropout, trained by `Trainer` and by a plain loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from plain_torch import PlainTorch, weights
from torch import nn
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup, set_seed

from fl_adapters.hf import FederatedCallback
from fl_adapters.testing import Trained, failing

ROWS, BATCH, RATE, CLIP = 8, 2, 0.05, 0.5


class Net(nn.Module):
    """A small network whose `fail_at`-th forward pass fails, counted from 1."""

    def __init__(self, width: int = 3, fail_at: int = 0) -> None:
        super().__init__()
        self.head, self.dropout, self.body = nn.Linear(width, 2), nn.Dropout(0.2), nn.Linear(2, 1)
        self.calls, self.fail_at = 0, fail_at

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.fail_at:
            failing()
        logits = self.body(self.dropout(torch.tanh(self.head(x)))).squeeze(-1)
        return {"loss": ((logits - labels) ** 2).mean(), "logits": logits}


def made(site: int, **options: Any) -> Net:
    random.seed(site)
    np.random.seed(site)
    torch.manual_seed(site)
    return Net(**options)


def rows_of(site: int, width: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 + site)
    x, y = torch.randn(ROWS, width, generator=generator), torch.randn(ROWS, generator=generator)
    return [{"x": x[i], "labels": y[i]} for i in range(ROWS)]


class PlainLoop(PlainTorch):
    """The same training as `Trainer`, in plain PyTorch: AdamW or SGD, linear schedule, clipping and order of rows.

    Gradients are corrected after clipping.
    """

    num_examples = ROWS

    def __init__(self, site: int, total_steps: int, kind: str, accumulate: int, bf16: bool) -> None:
        self.module, self.site, self.rows = made(site), site, rows_of(site)
        self.epoch, self.order = 0, list[int]()
        self.accumulate, self.bf16 = accumulate, bf16
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.module.parameters(), lr=RATE, weight_decay=0.0)
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, total_steps)
        self.rates: list[float] = []
        set_seed(site)  # as Trainer's constructor does

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(self.accumulate):
                self.order = self.order or self.shuffled()
                batch, self.order = [self.rows[i] for i in self.order[:BATCH]], self.order[BATCH:]
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    out = self.module(*(torch.stack([row[key] for row in batch]) for key in ("x", "labels")))
                (out["loss"] / self.accumulate).backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
            self.correct_gradients()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.schedule.step()

    def shuffled(self) -> list[int]:
        """Return accelerate's order of the rows in this epoch.

        A DataLoader also draws one number that it does not use without workers; so does this.
        """
        generator = torch.Generator().manual_seed(self.epoch + self.site)
        self.epoch += 1
        torch.empty((), dtype=torch.int64).random_()
        order: list[int] = torch.randperm(ROWS, generator=generator).tolist()
        return order


class Example:
    """The training job of the suite.

    Attributes:
        accumulate: Batches per optimizer step.
        bf16: Whether to train in bfloat16.
        kind: The optimizer, "adam" or "sgd".
    """

    personal = "head.*"
    states = ((torch.get_rng_state, torch.set_rng_state),)

    def __init__(self, folder: str, kind: str = "adam", accumulate: int = 1, bf16: bool = False) -> None:
        self.folder, self.kind, self.accumulate, self.bf16 = folder, kind, accumulate, bf16
        self.steps_per_epoch, self.plain_sgd = ROWS // BATCH // accumulate, kind == "sgd"

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        width = 5 if different else 3
        net = made(site, width=width, fail_at=fail_at)
        options = TrainingArguments(
            output_dir="out" if "kit" in arguments else self.folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=self.accumulate,
            bf16=self.bf16,
            optim="sgd" if self.kind == "sgd" else "adamw_torch",
            max_grad_norm=CLIP,
            learning_rate=RATE,
            seed=site,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        callback = FederatedCallback(**arguments)
        trainer = Trainer(net, options, train_dataset=rows_of(site, width), callbacks=[callback])
        trainer.train()
        return Trained(weights(net), trainer.state.global_step)

    def plain(self, site: int, *, total_steps: int) -> PlainLoop:
        return PlainLoop(site, total_steps, self.kind, self.accumulate, self.bf16)
