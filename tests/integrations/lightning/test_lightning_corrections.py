"""Corrected gradients and personal models under Lightning, compared with a plain loop; corrections precede clipping."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
import torch

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import CorrectionCase, correction_cases

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"gradient_clip_val": 0.5},
    "sgd": {"kind": "plain sgd"},
    "momentum, accumulating": {"kind": "sgd", "accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "float16": {"kind": "plain sgd", "plugins": "16-mixed"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, options: dict[str, Any]) -> None:
    if "plugins" in options:  # scaled losses, which Lightning gives to GPUs alone
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        options = {**options, "plugins": m.package().plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    case(m.Example(m.package(), **options))


def test_steps_of_manual_optimization_are_corrected(federation: Any) -> None:
    run = federation(sites=1, rounds=2, every=2, strategy="fedprox:mu=0.5")
    torch.manual_seed(0)
    built, oracle = m.module(net=m.network(dropout=0.0), kind="plain sgd"), m.network(dropout=0.0)
    oracle.load_state_dict(built.net.state_dict())
    built.automatic_optimization = False
    automatic = built.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        optimizer = built.optimizers()
        optimizer.zero_grad()
        built.manual_backward(automatic(batch, batch_idx))
        optimizer.step()

    built.training_step = training_step
    data = list(m.loader(shuffle=False))
    m.trainer(FederatedCallback(kit=run.places[0].kit), max_epochs=9).fit(built, m.loader(shuffle=False))
    for step in range(4):
        if step % 2 == 0:
            anchors = [parameter.detach().clone() for parameter in oracle.parameters()]
        oracle.zero_grad()
        x, y = data[step % m.STEPS]
        torch.nn.functional.cross_entropy(oracle(x), y).backward()
        with torch.no_grad():
            for parameter, anchor in zip(oracle.parameters(), anchors, strict=True):
                parameter -= m.RATE * (parameter.grad + 0.5 * (parameter - anchor))
    for name, value in oracle.state_dict().items():
        assert m.weights(built.net)[name] == pytest.approx(value.numpy(), abs=1e-6), name
