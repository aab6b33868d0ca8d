"""The conformance suite with the Trainer of both packages."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
import torch

from fl_adapters.testing import AdapterExample, adapter_cases, training_cases
from fl_adapters.torch.state import TorchState


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_training(case: Any, pl: Any) -> None:
    case(m.Example(pl))


def make(seed: int, exchange: Any, keep_local: tuple[str, ...]) -> TorchState:
    torch.manual_seed(seed)
    return TorchState(m.module(), exchange, keep_local)


@pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
def test_state(case: Any) -> None:
    case(AdapterExample(make, lambda adapter: [(id(t), t.device) for t in adapter.tensors.values()]))
