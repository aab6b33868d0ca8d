"""The conformance suite on the HF callback."""

from __future__ import annotations

import pytest
from hf_example import Example

from fl_adapters.testing import TrainingCase, training_cases


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_the_callback_conforms(case: TrainingCase, tmp_path_factory: pytest.TempPathFactory) -> None:
    case(Example(str(tmp_path_factory.mktemp("alone"))))
