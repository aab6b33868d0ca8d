"""The federation equals plain PyTorch loops averaged by hand, to 1e-6, also when the moments travel."""

from __future__ import annotations

from typing import Any

import monai_models as m
import numpy as np
import pytest
import torch
from monai.handlers import LrScheduleHandler

from fl_adapters.monai import FederatedHandler

ROUNDS, SITES = 3, 2


def by_hand(policy: str, every: int, total: int, accumulate: int) -> dict[str, np.ndarray]:
    """Run each site's loop in turn with its own random state, and average in float64; all sites have as many rows."""
    before = torch.get_rng_state()
    loops, states = [], []
    for site in range(SITES):
        loops.append(m.Loop(site, total, accumulate))
        states.append(torch.get_rng_state())
    loops[1].load(loops[0].weights())
    for _ in range(ROUNDS):
        for site, loop in enumerate(loops):
            torch.set_rng_state(states[site])
            loop.train(every)
            states[site] = torch.get_rng_state()
        mean_of([loop.module.state_dict() for loop in loops])
        for parameters in zip(*(loop.module.parameters() for loop in loops), strict=True):
            moments = [loop.optimizer.state[p] for loop, p in zip(loops, parameters, strict=True)]
            if policy == "average":
                mean_of(moments)
        if policy == "reset":
            for loop in loops:
                loop.reset_optimizer()
    torch.set_rng_state(before)
    return loops[0].weights()


def mean_of(dicts: list[dict[str, torch.Tensor]]) -> None:
    for name in dicts[0]:
        tensors = [d[name] for d in dicts]
        whole = name == "step" or not tensors[0].is_floating_point()
        mean = torch.stack([t.detach().double() for t in tensors])
        mean = mean.amax(0) if whole else mean.mean(0)
        for tensor in tensors:
            tensor.data.copy_(mean)


def federated(federation: Any, policy: str, every: int | str, total: int, accumulate: int = 1) -> list[Any]:
    run = federation(sites=SITES, rounds=ROUNDS, every=every, optimizer_state=policy)

    def site(place: Any) -> dict[str, np.ndarray]:
        torch.manual_seed(100 + place.index)
        net = m.network()
        optimizer = m.optimizer_for(net)
        schedule = LrScheduleHandler(m.linear_schedule(optimizer, total), print_lr=False, epoch_level=False)
        options = {"accumulation_steps": accumulate} if accumulate > 1 else {}
        handlers = [schedule, FederatedHandler(kit=place.kit)]
        m.trainer(net, handlers, data=m.loader(place.index), optimizer=optimizer, **options).run()
        return m.weights(net)

    return list(run.run(site).values())


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
@pytest.mark.parametrize(
    ("every", "steps", "iterations", "accumulate"),
    [("epoch", 3, 9, 1), (2, 2, 6, 1), (4, 4, 12, 1), (3, 3, 14, 2), ("2 epochs", 4, 18, 2)],
)
def test_equals_torch_loops_averaged_by_hand(federation, policy, every, steps, iterations, accumulate) -> None:
    if accumulate > 1 and not m.ACCUMULATES:
        pytest.skip("this MONAI cannot accumulate gradients")
    results = federated(federation, policy, every, iterations, accumulate)
    expected = by_hand(policy, steps, iterations, accumulate)
    for result in results:
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_the_policies_differ_from_each_other(federation) -> None:
    """Otherwise the equalities above could not tell the policies apart."""
    last = [federated(federation, policy, 2, 6)[0] for policy in ("keep", "reset", "average")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert max(np.abs(last[a][n] - last[b][n]).max() for n in last[a] if last[a][n].dtype.kind == "f") > 1e-5
