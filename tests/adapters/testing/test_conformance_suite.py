"""The conformance suite itself: a correct toy framework passes, and each kind of mistake is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fl_adapters.participant.exchange import selected
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Exchange, Options
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.session import Session
from fl_adapters.testing import (
    AdapterCase,
    AdapterExample,
    LocalFederation,
    Place,
    Trained,
    TrainingCase,
    adapter_cases,
    check_adapter,
    check_training,
    failing,
    training_cases,
)
from fl_runtime.errors import QuorumError, StateMismatchError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest, differences


class ToyState:
    """An adapter over a dict of arrays of many dtypes."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, seed: int, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> None:
        rng = np.random.default_rng(seed)
        self.tensors: dict[str, Array] = {
            "body.weight": rng.normal(size=(3, 4)).astype(np.float32),
            "body.scale": rng.normal(size=5).astype(ml_dtypes.bfloat16),
            "body.half": rng.normal(size=5).astype(np.float16),
            "body.wide": rng.normal(size=(2, 1)),
            "empty": np.zeros((0, 3), np.float32),
            "steps": np.array(seed, np.int64),
            "mask": np.array([True, False]),
        }
        self.names = selected(self.tensors, exchange, keep_local)

    def get_state(self) -> Arrays:
        return {name: self.tensors[name] for name in self.names}

    def set_state(self, arrays: Arrays) -> None:
        self.check(arrays)
        for name, array in arrays.items():
            self.tensors[name][...] = array

    def check(self, arrays: Arrays) -> None:
        lines = differences(Manifest.of(self.get_state()), Manifest.of(arrays))
        if lines:
            raise StateMismatchError("; ".join(lines))


class Replaces(ToyState):
    def set_state(self, arrays: Arrays) -> None:
        self.check(arrays)
        self.tensors |= {name: np.array(array) for name, array in arrays.items()}


class KeepsViews(ToyState):
    def set_state(self, arrays: Arrays) -> None:
        self.check(arrays)
        self.tensors |= arrays


class ChecksWhileCopying(ToyState):
    def set_state(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name in self.tensors and array.shape == self.tensors[name].shape:
                self.tensors[name][...] = array
        self.check(arrays)


class RoundsToHalf(ToyState):
    def get_state(self) -> Arrays:
        return {
            name: array.astype(np.float16).astype(array.dtype) if array.dtype == np.float32 else array
            for name, array in super().get_state().items()
        }


class IgnoresKeepLocal(ToyState):
    def __init__(self, seed: int, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> None:
        super().__init__(seed, exchange, ())


def identities(adapter: Any) -> object:
    return [id(array) for array in adapter.tensors.values()]


@pytest.mark.parametrize("case", adapter_cases(), ids=lambda case: case.__name__)
def test_a_good_adapter_passes(case: AdapterCase) -> None:
    case(AdapterExample(ToyState, identities))


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        (Replaces, "parameters_keep_their_identity"),
        (KeepsViews, "what_arrives_is_copied"),
        (ChecksWhileCopying, "mismatches_are_refused_and_change_nothing"),
        (RoundsToHalf, "state_survives_bit_for_bit|extreme_values"),
        (IgnoresKeepLocal, "patterns_choose_what_travels"),
    ],
)
def test_a_bad_adapter_is_caught(adapter: Any, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_adapter(adapter, identities=identities)


class ToyTrainer:
    """A tiny framework: linear regression by SGD with momentum, shuffled by NumPy's global random state."""

    batch, rows, lr = 2, 8, 0.05

    def __init__(self, site: int, width: int = 3) -> None:
        np.random.seed(site)
        self.site = site
        self.weights: dict[str, Array] = {"head.w": np.random.normal(size=width), "body.b": np.zeros(1)}
        self.moments = {name: np.zeros_like(array) for name, array in self.weights.items()}
        data = np.random.default_rng(100 + site)
        self.x, self.y = data.normal(size=(self.rows, width)), data.normal(size=self.rows)
        self.order = np.arange(0)
        self.steps = 0

    def step(self) -> None:
        if not len(self.order):
            self.order = np.random.permutation(self.rows)
        rows, self.order = self.order[: self.batch], self.order[self.batch :]
        error = self.x[rows] @ self.weights["head.w"] + self.weights["body.b"] - self.y[rows]
        gradients = {"head.w": self.x[rows].T @ error / self.batch, "body.b": error.mean(keepdims=True)}
        for name, gradient in gradients.items():
            self.moments[name][...] = 0.9 * self.moments[name] + gradient
            self.weights[name] -= self.lr * self.moments[name]
        self.steps += 1

    def fit(self, epochs: int, callback: ToyCallback, fail_at: int = 0) -> None:
        self.max_steps = epochs * self.rows // self.batch
        callback.begin(self)
        while self.steps < self.max_steps:
            if self.steps + 1 == fail_at:
                failing()
            self.step()
            callback.after_step(self)


class ToyCallback:
    """The parts of an integration, without anything that a real framework needs."""

    def __init__(self, **arguments: Any) -> None:
        self.options = Options(**arguments)
        self.session: Session | None = None

    def begin(self, trainer: ToyTrainer) -> None:
        session = self.session = open_session(self.options, framework="toy", fresh=True)
        if session is None:
            return
        settings = session.settings
        self.names = selected(trainer.weights, settings.exchange, settings.keep_local)
        epoch = trainer.rows // trainer.batch
        self.every = settings.every.steps or (settings.every.epochs or 1) * epoch
        rounds = session.register(
            self.state(trainer), agreement={}, rounds=trainer.max_steps // self.every, evaluates=False
        )
        trainer.max_steps = rounds * self.every
        self.load(trainer, session.start(lambda: self.state(trainer)).arrays)

    def after_step(self, trainer: ToyTrainer) -> None:
        if self.session is None or trainer.steps % self.every:
            return
        task = self.session.exchange(self.state(trainer), LocalResult(trainer.rows, self.every, {"train_loss": 1.0}))
        self.load(trainer, task.arrays)
        if task.kind == "final":
            trainer.max_steps = trainer.steps
            self.session.finish()

    def state(self, trainer: ToyTrainer) -> Arrays:
        return {name: trainer.weights[name] for name in self.names}

    def load(self, trainer: ToyTrainer, arrays: Arrays) -> None:
        for name, array in arrays.items():
            trainer.weights[name][...] = array
        if self.session is not None and self.session.settings.optimizer_state == "reset":
            for moment in trainer.moments.values():
                moment[...] = 0.0


class ToyPlainLoop:
    def __init__(self, site: int) -> None:
        self.trainer = ToyTrainer(site)

    num_examples = ToyTrainer.rows

    def weights(self) -> Arrays:
        return self.trainer.weights

    def load(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self.trainer.weights[name][...] = array

    def reset_optimizer(self) -> None:
        for moment in self.trainer.moments.values():
            moment[...] = 0.0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.trainer.step()


class ToyExample:
    steps_per_epoch = ToyTrainer.rows // ToyTrainer.batch
    personal = "head.*"
    states = ((np.random.get_state, np.random.set_state),)
    callback: Callable[..., ToyCallback] = ToyCallback

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        trainer = ToyTrainer(site, width=5 if different else 3)
        trainer.fit(epochs, type(self).callback(**arguments), fail_at)
        return Trained(trainer.weights, trainer.steps)

    def plain(self, site: int, *, total_steps: int) -> ToyPlainLoop:
        return ToyPlainLoop(site)


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_a_good_training_passes(case: TrainingCase) -> None:
    case(ToyExample())


class ForgetsTheReset(ToyCallback):
    def load(self, trainer: ToyTrainer, arrays: Arrays) -> None:
        for name, array in arrays.items():
            trainer.weights[name][...] = array


class DropsTheLastWeights(ToyCallback):
    def load(self, trainer: ToyTrainer, arrays: Arrays) -> None:
        if trainer.steps < trainer.max_steps:
            super().load(trainer, arrays)


class TrainsTooLong(ToyCallback):
    def after_step(self, trainer: ToyTrainer) -> None:
        super().after_step(trainer)
        if trainer.steps == trainer.max_steps - 1:
            trainer.step()
            trainer.steps -= 1


class SendsEverything(ToyCallback):
    def begin(self, trainer: ToyTrainer) -> None:
        self.options = Options(kit=self.options.kit, every=self.options.every)
        super().begin(trainer)


@pytest.mark.parametrize(
    ("callback", "found"),
    [
        (ForgetsTheReset, "equals_a_plain_loop_with_reset_optimizer"),
        (DropsTheLastWeights, "equals_a_plain_loop_with_kept_optimizer"),
        (TrainsTooLong, "equals_a_plain_loop_with_kept_optimizer"),
        (SendsEverything, "local_tensors_stay"),
    ],
)
def test_a_bad_callback_is_caught(callback: Any, found: str) -> None:
    example = type("Example", (ToyExample,), {"callback": callback})()
    with pytest.raises(AssertionError, match=found):
        check_training(example)


def test_sites_take_turns_with_random_states_of_their_own() -> None:
    def work(place: Place) -> list[float]:
        session = open_session(Options(kit=place.kit), framework="test")
        assert session is not None
        session.register({"w": np.zeros(2)}, agreement={}, rounds=None, evaluates=False)
        task, drawn = session.start(lambda: {"w": np.zeros(2)}), []
        while task.kind == "train":
            drawn.append(np.random.random())
            task = session.exchange({"w": task.arrays["w"]}, LocalResult(1, 1, {}))
        session.finish()
        return drawn

    np.random.seed(7)
    alone = [np.random.random() for _ in range(3)]
    np.random.seed(7)
    with LocalFederation(sites=3, rounds=3, states=[]) as federation:
        drawn = federation.run(work)
    assert list(drawn.values()) == [alone] * 3


def test_work_that_never_takes_part_ends_the_run_with_the_reason() -> None:
    def work(place: Place) -> None:
        if place.index == 0:
            open_session(Options(kit=place.kit), framework="test")
            return
        session = open_session(Options(kit=place.kit), framework="test")
        assert session is not None
        session.register({"w": np.zeros(2)}, agreement={}, rounds=None, evaluates=False)

    with (
        LocalFederation(sites=2, rounds=1) as federation,
        pytest.raises(QuorumError, match="ended before the last round"),
    ):
        federation.run(work)


def test_a_federation_leaves_no_folder_behind_and_tells_what_happened() -> None:
    with LocalFederation(sites=["a", "b"], rounds=1) as federation:
        folder = federation.folder
        assert [place.name for place in federation.places] == ["a", "b"]
        assert (folder / "sites" / "b" / "kit" / "kit.json").exists()
    assert not folder.exists()
    assert federation.events[-1].kind == "failed"
