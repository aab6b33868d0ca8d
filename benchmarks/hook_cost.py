"""Measures what the adapters cost between exchanges: the share of a training loop's time that is spent in our hooks.

One site trains for one long round, with steps of 10 ms and more. Every hook of the adapter is timed; the few that wait
for the server are left out. Each framework runs in a process of its own.

    python benchmarks/hook_cost.py [hf|lightning|torch|keras-tensorflow|keras-torch|keras-jax|monai ...] [--steps 300]

Columns: milliseconds of a step, microseconds of our hooks in a step, and their share of the loop's time. Ends with
status 1 if a share is above 1 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np

STEP_S = 0.010
LIMIT = 0.01
ROWS = 8  # rows of a batch


@dataclass
class Hooks:
    """Times of an adapter's hooks.

    Attributes:
        seconds: Duration of each call of a hook, in their order. A hook that another one calls is part of that one.
    """

    seconds: list[float] = field(default_factory=list)
    _within: bool = False

    def timed(self, callback: Any, prefix: str = "on_") -> Any:
        """Time the methods of `callback` whose names begin with `prefix`, and return it."""
        for name, member in vars(type(callback)).items():
            if name.startswith(prefix) and not name.startswith("__") and isinstance(member, FunctionType):
                setattr(callback, name, self.timed_call(getattr(callback, name)))
        return callback

    def timed_call(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls `hook` and records the time it takes."""

        @functools.wraps(hook)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return hook(*args, **kwargs)
            self._within = True
            began = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - began)
                self._within = False

        return timed

    def between_exchanges_s(self) -> float:
        """Sum of all calls but the four that join, begin, exchange, and end the run."""
        return sum(sorted(self.seconds)[:-4])


@contextmanager
def federation() -> Iterator[str]:
    """Run a federation of one site; yields the path of its startup kit."""
    from fl_adapters.testing import LocalFederation

    with LocalFederation(sites=1, rounds=1) as run:
        yield run.places[0].kit


def hf(kit: str, steps: int, hooks: Hooks) -> float:
    import torch
    from transformers import Trainer, TrainingArguments

    from fl_adapters.hf import FederatedCallback

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            time.sleep(STEP_S)
            return {"loss": ((self.layer(x)[:, 0] - labels) ** 2).mean()}

    rows = [{"x": torch.ones(8), "labels": torch.tensor(1.0)} for _ in range(ROWS * steps)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            num_train_epochs=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        callback = hooks.timed(FederatedCallback(kit=kit))
        trainer = Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback])
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


def lightning(kit: str, steps: int, hooks: Hooks) -> float:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from fl_adapters.lightning import FederatedCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(STEP_S)
            return (self.layer(batch[0]) ** 2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(TensorDataset(torch.ones(ROWS * steps, 8)), batch_size=ROWS)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, callbacks=[hooks.timed(FederatedCallback(kit=kit))], **quiet)
    began = time.perf_counter()
    trainer.fit(Module(), loader)
    return time.perf_counter() - began


def keras(kit: str, steps: int, hooks: Hooks) -> float:
    import keras as k

    from fl_adapters.keras import FederatedCallback

    width = 1024
    while True:  # a compiled step cannot sleep, so widen the model until a step takes as long
        layers = [k.layers.Dense(width, activation="relu") for _ in range(4)]
        model = k.Sequential([k.Input((width,)), *layers, k.layers.Dense(1)])
        model.compile(k.optimizers.SGD(0.001), "mse")
        x, y = np.ones((ROWS * steps, width), "float32"), np.ones((ROWS * steps, 1), "float32")
        few = 10 * ROWS
        model.fit(x[:few], y[:few], batch_size=ROWS, verbose=0)
        began = time.perf_counter()
        model.fit(x[:few], y[:few], batch_size=ROWS, verbose=0)
        if time.perf_counter() - began > 10 * STEP_S:
            break
        width *= 2
    callback = hooks.timed(FederatedCallback(kit=kit))
    began = time.perf_counter()
    model.fit(x, y, batch_size=ROWS, verbose=0, callbacks=[callback])
    return time.perf_counter() - began


def monai(kit: str, steps: int, hooks: Hooks) -> float:
    import torch
    from monai.engines import SupervisedTrainer

    from fl_adapters.monai import FederatedHandler

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def forward(self, x: Any) -> Any:
            time.sleep(STEP_S)
            return self.layer(x)

    net = Net()
    rows = [{"image": torch.ones(8), "label": torch.ones(1)} for _ in range(ROWS * steps)]
    handler = hooks.timed(FederatedHandler(kit=kit), "_")
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=torch.utils.data.DataLoader(rows, batch_size=ROWS),
        network=net,
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        loss_function=torch.nn.MSELoss(),
        train_handlers=[handler],
    )
    began = time.perf_counter()
    trainer.run()
    return time.perf_counter() - began


def torch_loop(kit: str, steps: int, hooks: Hooks) -> float:
    """Train with `FederatedLoop`. Timed: taking a batch, adding a loss, our hooks on the optimizer's step."""
    import torch

    from fl_adapters.torch import FederatedLoop

    net = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for name in ("register_step_pre_hook", "register_step_post_hook"):  # of this one optimizer
        register = getattr(optimizer, name)
        setattr(optimizer, name, lambda hook, register=register: register(hooks.timed_call(hook)))
    batches = [torch.ones(ROWS, 8)] * steps  # a list: what taking a batch costs is ours alone
    began = time.perf_counter()
    for round in taken(FederatedLoop(net, optimizer, kit=kit).rounds(batches), hooks):
        add_loss = hooks.timed_call(round.add_loss)
        for x in taken(iter(round), hooks):
            optimizer.zero_grad()
            time.sleep(STEP_S)
            loss = (net(x) ** 2).mean()
            loss.backward()
            optimizer.step()
            add_loss(loss)
    return time.perf_counter() - began


def taken(items: Iterator[Any], hooks: Hooks) -> Iterator[Any]:
    """Yield the items, and record the time that each takes to come."""
    take = hooks.timed_call(items.__next__)
    with suppress(StopIteration):
        while True:
            yield take()


TRAININGS = {
    "hf": hf,
    "lightning": lightning,
    "torch": torch_loop,
    "keras-tensorflow": keras,
    "keras-torch": keras,
    "keras-jax": keras,
    "monai": monai,
}


def measure(name: str, steps: int) -> None:
    hooks = Hooks()
    with federation() as kit:
        wall_s = TRAININGS[name](kit, steps, hooks)
    waiting_s = sum(hooks.seconds) - hooks.between_exchanges_s()
    loop_s = wall_s - waiting_s
    print(json.dumps({"hooks_s": hooks.between_exchanges_s(), "loop_s": loop_s, "calls": len(hooks.seconds)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FRAMEWORK", help=f"one of {', '.join(TRAININGS)} (default: all)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(TRAININGS):
        parser.error(f"no such framework: {', '.join(sorted(unknown))}; there are {', '.join(TRAININGS)}")
    if args.here:
        return measure(args.names[0], args.steps)
    over = []
    print(f"{'framework':17} step ms  hooks us a step  share of the loop's time")
    for name in args.names or TRAININGS:
        environment = {**os.environ, "KERAS_BACKEND": name.partition("-")[2] or "torch"}
        command = [sys.executable, __file__, name, "--steps", str(args.steps), "--here"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        row = json.loads(done.stdout.splitlines()[-1])
        share = row["hooks_s"] / row["loop_s"]
        step_ms, hooks_us = 1e3 * row["loop_s"] / args.steps, 1e6 * row["hooks_s"] / args.steps
        print(f"{name:17} {step_ms:7.1f}  {hooks_us:15.0f}  {share:.2%}", flush=True)
        over += [name] if share > LIMIT else []
    if over:
        sys.exit(f"more than {LIMIT:.0%}: {', '.join(over)}")


if __name__ == "__main__":
    main()
