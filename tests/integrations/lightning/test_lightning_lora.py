"""Strategies for LoRA under Lightning, whose modules wrap a PEFT model: the mean of the sites' merged weights."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.lightning import FederatedCallback

peft = pytest.importorskip("peft")

ROWS = (24, 48)


def adapted(rank: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.manual_seed(1)
    settings = {"r": rank, "lora_alpha": 3, "target_modules": ["0", "2"], "init_lora_weights": False}
    return peft.get_peft_model(net, peft.LoraConfig(**settings))


def merged(net: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach().numpy()
        for name, layer in net.named_modules()
        if hasattr(layer, "lora_A")
    }


class Before(m.package().Callback):
    """Notes the weights before they are exchanged; it comes before the federation's callback."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(merged(module.net))


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("rolora", (2, 2)), ("flora", (1, 2)), ("fedex-lora", (2, 2)), ("flexlora", (4, 4))]
)
def test_merged_weight_is_the_mean_of_the_sites(federation, strategy: str, ranks: tuple[int, int]) -> None:
    run = federation(sites=2, rounds=2, every=3, strategy=strategy)

    def site(place: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        before, net = Before(), adapted(ranks[place.index])
        trainer = m.trainer(callbacks=[before, FederatedCallback(kit=place.kit)], max_epochs=100)
        trainer.fit(m.module(net=net), m.loader(place.index, ROWS[place.index]))
        return before.seen[-1], merged(net)

    found = list(run.run(site).values())
    shares = np.array(ROWS) / sum(ROWS)
    for _, final in found:
        for name, value in final.items():
            wanted = sum(p * before[name] for p, (before, _) in zip(shares, found, strict=True))
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
            assert np.abs(found[0][0][name] - wanted).max() > 1e-3
