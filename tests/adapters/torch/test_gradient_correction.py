"""Corrected gradients in plain PyTorch loops, with and without scaled losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fl_adapters.torch.local_work.correction import GradientCorrection, StepMeter, is_plain_sgd
from fl_runtime.errors import ConfigError

RATE, MU = 0.1, 0.5
ROWS = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))


def net() -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def correction_of(model: Any, optimizer: Any, meter: StepMeter | None) -> GradientCorrection:
    correction = GradientCorrection(dict(model.named_parameters()))
    correction.follow([optimizer])
    anchors = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    offsets = {"weight": torch.full((1, 3), 0.25)}
    correction.begin(mu=MU, anchors=anchors, offsets=offsets, meter=meter)
    return correction


def by_hand(kept: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights and the mean gradients after steps on these batches."""
    model, sums = net(), dict[str, Any]()
    for batch in kept:
        model.zero_grad()
        (model(ROWS[batch]) ** 2).mean().backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad.clone()
                sums[name] = sums.get(name, 0.0) + gradient
                gradient += MU * parameter + (0.25 if name == "weight" else 0.0)
                parameter -= RATE * gradient
    return model.state_dict(), {name: total / len(kept) for name, total in sums.items()}


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_see_corrected_gradients_and_the_meter_their_own(scaled: bool) -> None:
    """A step that the scaler skips because of an infinite gradient is not counted."""
    model, meter = net(), StepMeter(gradients=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    correction_of(model, optimizer, meter)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    for batch, rows in enumerate(ROWS):
        optimizer.zero_grad()
        loss = (model(rows) ** 2).mean() * (float("inf") if scaled and batch == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    wanted, means = by_hand([0, 1, 3, 4, 5] if scaled else range(6))
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6)
        np.testing.assert_allclose(meter.means()[name], means[name], atol=1e-6)
    assert meter.rates() == pytest.approx({"weight": RATE * (5 if scaled else 6), "bias": RATE * (5 if scaled else 6)})


@pytest.mark.parametrize("scale", [None, 64.0])
def test_gradients_that_are_scaled_still_get_a_scaled_correction(scale: float | None) -> None:
    """A fused optimizer unscales and checks by itself, so the correction must come before."""
    model, meter = net(), StepMeter(gradients=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    correction = correction_of(model, optimizer, meter)
    for batch, rows in enumerate(ROWS[:3]):
        optimizer.zero_grad()
        ((model(rows) ** 2).mean() * (scale or 1.0) * (float("nan") if batch == 1 else 1.0)).backward()
        correction.add(optimizer, scale=scale, may_skip=True)
        correction.close()  # the step itself is not corrected once more
        if batch != 1:
            for parameter in model.parameters():
                parameter.grad /= scale or 1.0
            optimizer.step()
        correction = correction_of(model, optimizer, meter)
    wanted, means = by_hand([0, 2])
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6)
        np.testing.assert_allclose(meter.means()[name], means[name], atol=1e-6)
    assert meter.rates()["weight"] == pytest.approx(2 * RATE)


def test_after_closing_steps_are_the_scripts_own() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    correction_of(model, optimizer, None).close()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.zero_grad()
    model(ROWS[0]).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), before[name] - RATE * parameter.grad, atol=1e-6)


def test_sparse_gradients_are_refused() -> None:
    model = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    correction = GradientCorrection({"weight": model.weight})
    correction.begin(mu=1.0, anchors={"weight": model.weight})
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        correction.add(optimizer)


def test_a_closure_is_refused() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    correction_of(model, optimizer, None)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda p: torch.optim.SGD(p, lr=RATE, weight_decay=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9), False),
        (lambda p: torch.optim.SGD([{"params": p, "momentum": 0.5}], lr=RATE), False),
        (lambda p: torch.optim.Adam(p, lr=RATE), False),
    ],
)
def test_what_counts_as_plain_sgd(make: Any, plain: bool) -> None:
    assert is_plain_sgd(make(list(net().parameters()))) is plain
