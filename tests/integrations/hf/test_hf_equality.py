"""The federation equals averaging by hand, to 1e-6: same batches, random states and thread count at each site.

There are two references without any of our code. In one, plain `Trainer`s take turns in one process, an epoch each, and
NumPy averages between the epochs; dropout and shuffling are on. The other is a plain PyTorch loop.
"""

from __future__ import annotations

import numpy as np
import pytest

SITE = """
import torch
import hf_models as m
from fl_adapters.hf import FederatedCallback

torch.set_num_threads(1)
model, rows = m.to_compare(VALUES["lora"], VALUES["dropout"])
data = rows(VALUES["rows"], seed=VALUES["rows"])
trainer = m.trainer(
    FederatedCallback(optimizer_state=VALUES["policy"]), model=model,
    train_dataset=m.InOrder(data) if VALUES["in_order"] else data,
    learning_rate=1e-3 if VALUES["in_order"] else 1e-2,
    # the torch loop sums its loss in another order; Adam must not blow that rounding up
    adam_epsilon=1e-4 if VALUES["in_order"] else 1e-8,
)
trainer.train()
RESULT = {name: value.numpy() for name, value in model.state_dict().items()}
"""

TRAINERS = """
import random, threading
import numpy as np
import torch
from transformers import TrainerCallback
import hf_models as m

torch.set_num_threads(1)

class Turns(TrainerCallback):
    # trains when it is its turn, with random states of its own, and hands over at the end of each epoch
    def __init__(self):
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.states = None

    def on_epoch_end(self, args, state, control, optimizer=None, **_):
        self.optimizer = optimizer
        self.states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.done.release()
        self.go.acquire()

    def turn(self):
        if self.states:
            torch.set_rng_state(self.states[0]); np.random.set_state(self.states[1]); random.setstate(self.states[2])
        self.go.release()
        self.done.acquire()

def build(rows, turns):
    turns.go.acquire()
    turns.model, data = m.to_compare(VALUES["lora"], VALUES["dropout"])
    m.trainer(
        turns, model=turns.model, train_dataset=data(rows, seed=rows), num_train_epochs=VALUES["rounds"]
    ).train()
    turns.done.release()

sites = [Turns() for _ in VALUES["rows"]]
for rows, turns in zip(VALUES["rows"], sites):
    threading.Thread(target=build, args=(rows, turns), daemon=True).start()
share = np.array(VALUES["rows"]) / sum(VALUES["rows"])

def average(tensors):
    mean = sum(s * t.detach().double().numpy() for s, t in zip(share, tensors))
    for tensor in tensors:
        tensor.data.copy_(torch.from_numpy(np.asarray(mean)))

for _ in range(VALUES["rounds"]):
    for turns in sites:
        turns.turn()
    trained = [[p for p in turns.model.parameters() if p.requires_grad] for turns in sites]
    for parameters in zip(*trained):
        average(parameters)
        states = [turns.optimizer.optimizer.state[p] for turns, p in zip(sites, parameters)]
        if VALUES["policy"] == "average":
            for key in ("exp_avg", "exp_avg_sq"):
                average([state[key] for state in states])
            top = max(state["step"].item() for state in states)
            for state in states:
                state["step"].fill_(top)
        if VALUES["policy"] == "reset":
            for state in states:
                for value in state.values():
                    value.zero_()
RESULT = {name: value.numpy() for name, value in sites[0].model.state_dict().items()}
"""

BY_HAND = """
import numpy as np
import torch
import hf_models as m

torch.set_num_threads(1)
total = sum(VALUES["rows"])
sites = []
for rows in VALUES["rows"]:
    model, data = m.to_compare(VALUES["lora"], dropout=0.0)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    batches = torch.utils.data.DataLoader(data(rows, seed=rows), batch_size=8)
    sites.append((rows, model, trained, optimizer, batches, [0]))
for _ in range(VALUES["rounds"]):
    for rows, model, trained, optimizer, batches, step in sites:
        horizon = VALUES["rounds"] * len(batches)
        for batch in batches:
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step[0] / horizon)
            model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step[0] += 1
    for parameters in zip(*(trained for _, _, trained, *_ in sites)):
        mean = sum(site[0] / total * p.detach().double() for site, p in zip(sites, parameters))
        for p in parameters:
            p.data.copy_(mean)
RESULT = {name: value.numpy() for name, value in sites[0][1].state_dict().items()}
"""

ROWS = (32, 56)
ROUNDS = 3


def federated(run, **values) -> list[dict]:
    sites = [run.fork(SITE, {**values, "rows": rows}, number=i + 1) for i, rows in enumerate(ROWS)]
    results = [site.result() for site in sites]
    run.ended()
    return results


def assert_equal(results: list[dict], expected: dict) -> None:
    for result in results:
        assert set(result) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_trainers_averaged_by_hand(federation, lora, policy) -> None:
    run = federation(sites=2, rounds=ROUNDS)
    values = {"lora": lora, "policy": policy, "dropout": 0.1, "in_order": False}
    results = federated(run, **values)
    expected = run.fork(TRAINERS, {**values, "rows": ROWS, "rounds": ROUNDS}, number=None).result()
    assert_equal(results, expected)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_a_torch_loop_averaged_by_hand(federation, lora) -> None:
    run = federation(sites=2, rounds=ROUNDS)
    values = {"lora": lora, "policy": "keep", "dropout": 0.0, "in_order": True}
    results = federated(run, **values)
    expected = run.fork(BY_HAND, {"lora": lora, "rows": ROWS, "rounds": ROUNDS}, number=None).result()
    assert_equal(results, expected)


def test_the_policies_differ_from_each_other(federation) -> None:
    """Otherwise the equalities above could not tell the policies apart."""
    last = []
    for policy in ("keep", "reset", "average"):
        run = federation(sites=2, rounds=ROUNDS)
        last.append(federated(run, lora=True, policy=policy, dropout=0.0, in_order=False)[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert max(np.abs(last[a][n] - last[b][n]).max() for n in last[a]) > 1e-5
