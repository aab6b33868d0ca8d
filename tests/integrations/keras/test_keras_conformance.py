"""The conformance suite on the backend of this process."""

from __future__ import annotations

import keras
import keras_models as m
import pytest

from fl_adapters.keras.state import KerasState
from fl_adapters.testing import AdapterCase, AdapterExample, TrainingCase, adapter_cases, training_cases

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself


def make(seed, exchange, keep_local) -> KerasState:
    return KerasState(m.classifier(seed=seed), exchange, keep_local)


def make_narrow(seed, exchange, keep_local) -> KerasState:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16"), keras.layers.Dense(2)])
    return KerasState(model, exchange, keep_local)


def identities(adapter: KerasState) -> object:
    """Return the identities of the variables, and of the arrays under them unless JAX must replace those."""
    live = [id(v) for v in adapter.variables.values()]
    if keras.backend.backend() == "torch":
        live += [v.value.data_ptr() for v in adapter.variables.values()]
    if keras.backend.backend() == "tensorflow":
        live += [id(v.value) for v in adapter.variables.values()]
    return live


@pytest.mark.parametrize("example", [make, make_narrow], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
def test_state(case: AdapterCase, example) -> None:
    case(AdapterExample(example, identities))


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_training(case: TrainingCase) -> None:
    case(m.Example())
