"""The conformance suite, with the handler first and last in the trainer's list."""

from __future__ import annotations

from typing import Any

import monai_models as m
import pytest
import torch
from monai.networks.nets import UNet

from fl_adapters.testing import AdapterExample, adapter_cases, training_cases
from fl_adapters.torch.state import TorchState


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_training(case: Any, first: bool) -> None:
    case(m.Example(first))


def make(seed: int, exchange: Any, keep_local: tuple[str, ...]) -> TorchState:
    torch.manual_seed(seed)
    net = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")
    return TorchState(net, exchange, keep_local)


@pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
def test_state(case: Any) -> None:
    case(AdapterExample(make, lambda adapter: [(id(t), t.device) for t in adapter.tensors.values()]))
