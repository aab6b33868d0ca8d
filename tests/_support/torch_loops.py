"""Small networks and training loops of one's own; the same seed gives the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from plain_torch import PlainTorch, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fl_adapters.testing import Trained, failing
from fl_adapters.torch import FederatedLoop


def accumulation() -> dict[str, Any]:
    """Return accelerate's place within an accumulated step, which belongs to the process."""
    return dict(GradientState._shared_state)


def set_accumulation(state: dict[str, Any]) -> None:
    GradientState._shared_state.clear()
    GradientState._shared_state.update(state)


STATES = [(torch.get_rng_state, torch.set_rng_state), (accumulation, set_accumulation)]
ROWS, BATCH = 24, 8
STEPS = ROWS // BATCH
RATE, DECAY = 0.05, 0.95
cross_entropy = nn.functional.cross_entropy


def network(width: int = 8) -> nn.Sequential:
    """Return a network with buffers (batch normalization) and random numbers (dropout)."""
    return nn.Sequential(
        nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.25), nn.Linear(width, 2)
    )


def rows(seed: int, count: int = ROWS) -> TensorDataset:
    """Return rows of four numbers; the label is whether the first two add up to more than zero."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def loader(seed: int = 0, count: int = ROWS, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows(seed, count), **{"batch_size": BATCH, "shuffle": True, "generator": generator, **options})


def optimizer_for(net: nn.Module, kind: str = "adam") -> torch.optim.Optimizer:
    if kind == "plain sgd":
        return torch.optim.SGD(net.parameters(), lr=RATE)
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    return torch.optim.AdamW(net.parameters(), lr=RATE)


def score(net: nn.Module, seed: int = 99) -> tuple[dict[str, float], int]:
    """Return the loss on validation rows, and their number."""
    net.eval()
    with torch.no_grad():
        x, y = rows(seed, 16).tensors
        return {"loss": cross_entropy(net(x), y).item()}, len(y)


class PlainLoop(PlainTorch):
    """One site's training in plain PyTorch, as the conformance suite's `PlainLoop`."""

    num_examples = ROWS

    def __init__(self, site: int, kind: str = "adam", accumulate: int = 1) -> None:
        torch.manual_seed(100 + site)
        self.module = network()
        self.optimizer = optimizer_for(self.module, kind)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, DECAY)
        self.loader, self.accumulate = loader(site), accumulate
        self.batches: Any = iter(())
        self.left = 0
        self.rates: list[float] = []

    def train(self, steps: int) -> None:
        self.module.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(self.accumulate):
                x, y = self.next_batch()
                (cross_entropy(self.module(x), y) / self.accumulate).backward()
                if not self.left:
                    break  # what an epoch leaves over is a step
            self.correct_gradients()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.schedule.step()

    def next_batch(self) -> Any:
        if not self.left:
            next(self.batches, None)  # as a `for` loop does: the sampler draws from its generator once more
            self.batches, self.left = iter(self.loader), len(self.loader)
        self.left -= 1
        return next(self.batches)


class Example:
    """The training job of the conformance suite: a loop of one's own, plain or under Accelerate."""

    personal = "1.*"
    states = STATES

    def __init__(self, kind: str = "adam", accumulate: int = 1, accelerate: bool = False) -> None:
        self.kind, self.accumulate, self.accelerate = kind, accumulate, accelerate
        self.plain_sgd, self.steps_per_epoch = kind == "plain sgd", -(-STEPS // accumulate)

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        torch.manual_seed(100 + site)
        net = network(width=12 if different else 8)
        optimizer = optimizer_for(net, self.kind)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
        made: list[int] = []
        handle = optimizer.register_step_post_hook(lambda *_: made.append(1))
        body = self.accelerated if self.accelerate else self.plainly
        body(site, net, optimizer, schedule, epochs, fail_at, made, arguments)
        handle.remove()
        return Trained(weights(net), len(made))

    def plainly(
        self, site: int, net: Any, optimizer: Any, schedule: Any, epochs: int, fail_at: int, made: Any, arguments: Any
    ) -> None:
        loop = FederatedLoop(net, optimizer, scheduler=schedule, **arguments)
        index = 0  # of the batch in its epoch, from 1: a round may begin within one
        for round in loop.rounds(loader(site), epochs=epochs):
            net.train()
            for x, y in round:
                index = index % STEPS + 1
                if fail_at and len(made) + 1 == fail_at:
                    failing()
                loss = cross_entropy(net(x), y)
                (loss / self.accumulate).backward()
                round.add_loss(loss)
                if index % self.accumulate == 0 or index == STEPS:
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()

    def accelerated(
        self, site: int, net: Any, optimizer: Any, schedule: Any, epochs: int, fail_at: int, made: Any, arguments: Any
    ) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulate)
        model, optimizer, batches, schedule = accelerator.prepare(net, optimizer, loader(site), schedule)
        loop = FederatedLoop(model, optimizer, scheduler=schedule, **arguments)
        for round in loop.rounds(batches, epochs=epochs):
            model.train()
            for x, y in round:
                if fail_at and len(made) + 1 == fail_at:
                    failing()
                with accelerator.accumulate(model):
                    loss = cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                round.add_loss(loss)

    def plain(self, site: int, *, total_steps: int) -> PlainLoop:
        return PlainLoop(site, self.kind, self.accumulate)


class ScoredExample(Example):
    """The same loop with a score of every global model."""

    def plainly(
        self, site: int, net: Any, optimizer: Any, schedule: Any, epochs: int, fail_at: int, made: Any, arguments: Any
    ) -> None:
        arguments = {"evaluate": lambda: score(net), **arguments}
        super().plainly(site, net, optimizer, schedule, epochs, fail_at, made, arguments)

    def score(self, site: int, weights: Any) -> Mapping[str, float]:
        net = network()
        net.load_state_dict({name: torch.as_tensor(np.asarray(array)) for name, array in weights.items()})
        return score(net)[0]
