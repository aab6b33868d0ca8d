"""The conformance suite on torch modules: a plain one with many dtypes and buffers, and PEFT models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fl_adapters.testing import AdapterCase, AdapterExample, adapter_cases
from fl_adapters.torch.state import TorchState

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.narrow = nn.Linear(3, 3).to(torch.bfloat16)
        self.head = nn.Linear(3, 2).double()
        self.register_buffer("mask", torch.tensor([True, False]))


def lora(net: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False)
    adapted: nn.Module = peft.get_peft_model(net, config)
    return adapted


def ia3(net: nn.Module) -> nn.Module:
    adapted: nn.Module = peft.get_peft_model(net, peft.IA3Config(target_modules=["body"], feedforward_modules=[]))
    return adapted


def example(wrap: Callable[[nn.Module], nn.Module]) -> AdapterExample:
    def make(seed: int, exchange: Any, keep_local: tuple[str, ...]) -> TorchState:
        torch.manual_seed(seed)
        return TorchState(wrap(Net()), exchange, keep_local)

    def identities(adapter: Any) -> object:
        return [(id(t), t.data_ptr(), t.device, t.requires_grad) for t in adapter.tensors.values()]

    return AdapterExample(make, identities)


@pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
@pytest.mark.parametrize("wrap", [lambda net: net, lora, ia3], ids=["plain", "lora", "ia3"])
def test_torch_modules_conform(case: AdapterCase, wrap: Callable[[nn.Module], nn.Module]) -> None:
    case(example(wrap))
