"""Corrected gradients and personal models in `fit`, compared with a plain loop, on the backend of this process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import keras_models as m
import numpy as np
import pytest

from fl_adapters import site
from fl_adapters.keras import FederatedCallback
from fl_adapters.keras.state import to_host
from fl_adapters.testing import LocalFederation, correction_cases
from fl_adapters.testing.conformance.adapter import require_close, require_same_bits
from fl_runtime.errors import ConfigError, HandshakeError
from fl_runtime.store.tensorfile import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"kind": "adam"},
    "sgd, clipped": {"kind": "sgd", "clipnorm": 0.1},
    "accumulating": {"kind": "sgd", "accumulate": 3},
    "float16": {"kind": "adam", "policy": "mixed_float16"},
}
COMBINATIONS = [(case.__name__, option) for option in OPTIONS for case in correction_cases()]
if keras.backend.backend() != "torch":  # compiling takes its time, and rounds float16 in places of its own
    COMBINATIONS = [(case, "adam") for case, option in COMBINATIONS if option == "adam" and "stays" not in case]
    COMBINATIONS.append(("scaffold_equals_a_plain_loop", "accumulating"))


@pytest.mark.parametrize(("case", "option"), COMBINATIONS)
def test_corrections(case: str, option: str) -> None:
    cases = {case.__name__: case for case in correction_cases()}
    cases[case](m.CorrectedExample(**OPTIONS[option]))


def federated(model: Any, strategy: str, *callbacks: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Fit for two rounds of an epoch; return the federation and the final weights."""
    with LocalFederation(sites=1, rounds=2, strategy=strategy, **settings) as federation:
        m.fit(model, m.rows(0), FederatedCallback(kit=federation.places[0].kit), *callbacks, epochs=9)
        federation.result()
        return federation, m.weights(model)


def sgd() -> Any:
    return m.compiled(m.classifier(dropout=0.0), keras.optimizers.SGD(0.05))


@pytest.mark.parametrize("strategy", ["fedprox:mu=5", "scaffold", "ditto"])
def test_a_fit_before_and_a_fit_after_are_the_users_own(strategy: str) -> None:
    """A step that an earlier fit has compiled is corrected; the step of a later fit is not."""
    model, other = sgd(), sgd()
    m.fit(model, m.rows(0))
    m.fit(other, m.rows(0))
    m.load(other, m.weights(model))
    _, weights = federated(model, strategy)
    _, uncorrected = federated(other, "fedavg")
    differs = any(weights[name].tobytes() != uncorrected[name].tobytes() for name in weights)
    assert differs is (strategy == "fedprox:mu=5")  # alone, c is c_i, and the personal model is not the global one
    assert len(model.optimizer.variables) == len(other.optimizer.variables)
    m.load(other, weights)
    for variable, value in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        variable.assign(np.array(to_host(value)))  # JAX would share the memory
    m.fit(model, m.rows(1))
    m.fit(other, m.rows(1))
    require_close(m.weights(model), m.weights(other))


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold"])
def test_what_others_save_has_the_users_optimizer(strategy: str, tmp_path: Path) -> None:
    saver = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    federated(m.compiled(m.classifier()), strategy, saver)
    files = sorted(tmp_path.glob("*.keras"))
    assert len(files) == 2
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras warns of an optimizer that has other variables
            loaded = keras.saving.load_model(file)
        assert int(loaded.optimizer.iterations) == m.BATCHES * int(file.stem)


def test_saving_within_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_freq"):
        federated(sgd(), "fedprox", keras.callbacks.ModelCheckpoint(str(tmp_path / "a.keras"), save_freq=2))


@pytest.mark.parametrize("policy", ["reset", "average"])
@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ditto"])
def test_policies_for_the_optimizer_leave_corrections_alone(strategy: str, policy: str) -> None:
    federation, _ = federated(m.compiled(m.classifier()), strategy, every=2, optimizer_state=policy)
    assert len(federation.result().rounds) == 2


def test_the_personal_model_opens_in_keras() -> None:
    with LocalFederation(sites=1, rounds=2, strategy="ditto") as federation:
        kit = federation.places[0].kit
        model = m.compiled(m.classifier())
        m.fit(model, m.rows(0), FederatedCallback(kit=kit), epochs=9)
        personal = site(kit).personal
        assert personal is not None
        kept = read_tensors(personal.parent / "personal.safetensors")
        require_same_bits(m.weights(keras.saving.load_model(personal / "model.keras")), kept)
        require_same_bits(m.weights(model), federation.model())
        training = [event.data["metrics"] for event in federation.events if event.kind == "update"]
    assert [sorted(metrics) for metrics in training] == [["train_loss", "train_personal_loss"]] * 2


def test_a_model_with_two_optimizers_is_refused_before_round_1() -> None:
    model = sgd()
    model.second = keras.optimizers.Adam()
    with pytest.raises(HandshakeError, match="gradient-correction"):
        federated(model, "fedprox")
