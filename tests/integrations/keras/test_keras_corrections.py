"""Corrected gradients and personal models in `fit`, beside a loop of its own, on the backend of this process."""

from __future__ import annotations

from typing import Any

import keras
import keras_models as m
import pytest

from fl_adapters.testing import CorrectionCase, correction_cases

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"kind": "adam"},
    "sgd, clipped": {"kind": "sgd", "clipnorm": 0.1},
    "accumulating": {"kind": "sgd", "accumulate": 3},
}
if keras.backend.backend() == "torch":  # elsewhere a compiled step rounds float16 in places of its own
    OPTIONS["float16"] = {"kind": "adam", "policy": "mixed_float16"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, options: dict[str, Any]) -> None:
    case(m.CorrectedExample(**options))
