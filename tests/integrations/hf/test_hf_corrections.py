"""Corrected gradients and personal models under `Trainer`, beside its plain loop."""

from __future__ import annotations

import pytest
from hf_example import Example

from fl_adapters.testing import CorrectionCase, correction_cases

OPTIONS = {
    "adam": {},
    "sgd": {"kind": "sgd"},
    "accumulating": {"kind": "sgd", "accumulate": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, options: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    case(Example(str(tmp_path_factory.mktemp("alone")), **options))
