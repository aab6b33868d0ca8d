"""Small networks, data and trainers; the same seed gives the same ones."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from ignite.metrics import Loss
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from plain_torch import PlainTorch, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fl_adapters.monai import FederatedHandler
from fl_adapters.testing import Trained, failing

STATES = [(torch.get_rng_state, torch.set_rng_state)]
ROWS, BATCH = 24, 8
STEPS = ROWS // BATCH
RATE = 0.05
ACCUMULATES = "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters  # MONAI 1.6 and later
cross_entropy = nn.functional.cross_entropy


def network(width: int = 8, dropout: float = 0.25) -> nn.Sequential:
    """Return a network with buffers (batch normalization) and random numbers (dropout).

    The layer below the normalization has no bias: its gradient would be zero up to rounding, which Adam amplifies.
    """
    return nn.Sequential(
        nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2)
    )


class Rows(Dataset):
    """Rows of four numbers; the label is whether the first two add up to more than zero."""

    def __init__(self, seed: int, count: int = ROWS) -> None:
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x[:, 0] + self.x[:, 1] > 0).long()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"image": self.x[i], "label": self.y[i]}


class Endless(IterableDataset):
    """A dataset of `count` rows without a length."""

    def __init__(self, count: int = ROWS) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(0, self.count)
        return (rows[i] for i in range(self.count))


def loader(seed: int = 0, count: int = ROWS, **options: Any) -> DataLoader:
    options = {"batch_size": BATCH, "shuffle": True, "generator": torch.Generator().manual_seed(seed), **options}
    return DataLoader(Rows(seed, count), **options)


def validation(count: int = 16, seed: int = 99) -> DataLoader:
    return DataLoader(Rows(seed, count), batch_size=8)


def optimizer_for(net: nn.Module, kind: str = "adam") -> torch.optim.Optimizer:
    if kind == "plain sgd":
        return torch.optim.SGD(net.parameters(), lr=RATE)
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    return torch.optim.AdamW(net.parameters(), lr=RATE)


def linear_schedule(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / total_steps, 0.0))


class Losses:
    """A handler that notes what other handlers see of each iteration."""

    def __init__(self, fail_at: int = 0) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.fail_at = fail_at

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def begin(self, engine: Any) -> None:
        if self.fail_at and engine.state.iteration == self.fail_at:
            failing()
        self.rates.append(engine.optimizer.param_groups[0]["lr"])

    def __call__(self, engine: Any) -> None:
        output = engine.state.output
        self.losses.append(torch.as_tensor((output[0] if isinstance(output, list) else output)["loss"]).item())


def evaluator(net: nn.Module, data: Any = None, handlers: Sequence[Any] = (), **options: Any) -> SupervisedEvaluator:
    """Return an evaluator that scores `val_loss` on the validation data."""
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=validation() if data is None else data,
        network=net,
        key_val_metric={"val_loss": Loss(cross_entropy, output_transform=lambda out: (out["pred"], out["label"]))},
        metric_cmp_fn=lambda new, best: new < best,
        val_handlers=list(handlers),
        decollate=False,
        **options,
    )


def validates(net: nn.Module, interval: int = 1, handlers: Sequence[Any] = (), **options: Any) -> ValidationHandler:
    return ValidationHandler(interval, evaluator(net, handlers=handlers), **options)


def trainer(
    net: nn.Module, handlers: Sequence[Any] = (), *, data: Any = None, epochs: int = 1, **options: Any
) -> SupervisedTrainer:
    """Return a trainer on the CPU, by default without decollating batches."""
    fields = {"optimizer": optimizer_for(net), "decollate": False, **options}
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=loader() if data is None else data,
        network=net,
        loss_function=cross_entropy,
        train_handlers=list(handlers),
        **fields,
    )


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(np.asarray(found[name]).tobytes() == np.asarray(wanted[name]).tobytes() for name in wanted)


def loss_of(arrays: Mapping[str, Any], data: Any = None) -> float:
    """Return the loss of these weights on the validation data, computed without MONAI."""
    net = network().eval()
    net.load_state_dict({name: torch.as_tensor(np.asarray(array)) for name, array in arrays.items()})
    batches = [(cross_entropy(net(b["image"]), b["label"]).item(), len(b["label"])) for b in data or validation()]
    return sum(loss * n for loss, n in batches) / sum(n for _, n in batches)


class Loop(PlainTorch):
    """One site's training in plain PyTorch, as the conformance suite's `PlainLoop`."""

    num_examples = ROWS

    def __init__(self, site: int, total_steps: int, accumulate: int = 1, kind: str = "adam") -> None:
        torch.manual_seed(100 + site)
        self.module = network()
        self.optimizer = optimizer_for(self.module, kind)
        self.rates: list[float] = []
        self.schedule = linear_schedule(self.optimizer, total_steps)
        self.loader, self.batches, self.accumulate = loader(site), iter(()), accumulate
        self.losses: list[float] = []
        self.seen = 0

    def train(self, steps: int) -> None:
        self.module.train()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Take a step as MONAI accumulates: what an epoch leaves over is a step, divided all the same."""
        self.optimizer.zero_grad()
        for _ in range(self.accumulate):
            self.schedule_of_the_iteration()
            batch = self.next_batch()
            loss = cross_entropy(self.module(batch["image"]), batch["label"])
            self.losses.append(float(loss.detach()))
            (loss / self.accumulate).backward()
            if self.seen % STEPS == 0:
                break
        self.correct_gradients()
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()

    def next_batch(self) -> dict[str, torch.Tensor]:
        """Return the next batch. Ignite asks each iterator for one batch more than it has, which draws an order."""
        if self.seen % STEPS == 0:
            next(self.batches, None)
            self.batches = iter(self.loader)
        self.seen += 1
        return next(self.batches)

    def schedule_of_the_iteration(self) -> None:
        """Step the schedule once per iteration, after it, as LrScheduleHandler does."""
        if self.seen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects an optimizer step before each
                self.schedule.step()


class Example:
    """The training job of the conformance suite; `options` are passed to the trainer."""

    personal = "1.*"
    states = STATES

    def __init__(self, first: bool, kind: str = "adam", **options: Any) -> None:
        self.first = first  # whether the handler comes before the others or after them
        self.kind, self.options, self.accumulate = kind, options, options.get("accumulation_steps", 1)
        self.plain_sgd, self.steps_per_epoch = kind == "plain sgd", -(-STEPS // self.accumulate)

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        torch.manual_seed(100 + site)
        net = network(width=12 if different else 8)
        optimizer = optimizer_for(net, self.kind)
        # nobody in MONAI sizes a schedule but the user: this one looks at the trainer's length
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total() if step else 1.0)
        schedule = LrScheduleHandler(rate, print_lr=False, epoch_level=False)
        others, ours = [schedule, Losses(fail_at)], FederatedHandler(**arguments)
        handlers = [ours, *others] if self.first else [*others, ours]
        training = trainer(net, handlers, data=loader(site), epochs=epochs, optimizer=optimizer, **self.options)
        total = lambda: training.state.max_epochs * STEPS  # noqa: E731
        made: list[int] = []
        handle = optimizer.register_step_post_hook(lambda *_: made.append(1))
        training.run()
        handle.remove()
        return Trained(weights(net), len(made))

    def plain(self, site: int, *, total_steps: int) -> Loop:
        epochs = -(-total_steps // self.steps_per_epoch)  # the schedule is sized for whole ones
        return Loop(site, epochs * STEPS, self.accumulate, self.kind)
