"""Corrected gradients and personal models under a MONAI trainer, compared with a plain loop."""

from __future__ import annotations

from typing import Any

import monai_models as m
import pytest

from fl_adapters.testing import CorrectionCase, correction_cases

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"kind": "plain sgd"},
    "momentum, accumulating": {"kind": "sgd", "accumulation_steps": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, options: dict[str, Any]) -> None:
    if "accumulation_steps" in options and not m.ACCUMULATES:
        pytest.skip("this MONAI cannot accumulate gradients")
    case(m.Example(False, **options))
