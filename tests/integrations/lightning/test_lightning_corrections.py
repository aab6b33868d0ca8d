"""Corrected gradients and personal models under Lightning, beside a plain loop: corrected before they are clipped."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
import torch

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
