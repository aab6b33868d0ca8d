"""Conformance cases for strategies that change local training: FedProx, SCAFFOLD, Ditto. Part of `fl_adapters.testing`.

An adapter's author writes a training job and a plain loop whose gradients can be changed in the place where the adapter
changes them. The cases hold the strategies' formulas in NumPy, independent of the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np

from fl_adapters.participant.exchange import matches
from fl_adapters.participant.outputs import PERSONAL_FILE
from fl_adapters.testing.conformance.adapter import copied, mean_by_hand, require, require_close, require_same_bits
from fl_adapters.testing.conformance.training import PlainLoop, Trained, TrainingExample
from fl_adapters.testing.local_federation import LocalFederation
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Array, Arrays

Correct: TypeAlias = Callable[[str, Array, Array], Array]
"""correct(name, weight, gradient) returns the gradient to use instead, as an array of the same shape."""

_EXAMPLES = (3, 1)  # num_examples of the two sites
_ROUNDS = 3


class CorrectedLoop(PlainLoop, Protocol):
    """A plain loop whose gradients can be changed, after accumulation and before the optimizer's step.

    Steps that loss scaling skips count for neither attribute.

    Attributes:
        correct: Called as correct(name, weight, gradient) for each trained tensor at each step; returns the gradient
            to use. None leaves gradients as they are. The suite sets it.
        rates: Learning rate of each step so far.
    """

    correct: Correct | None
    rates: list[float]

    def exchange_optimizer(self, state: Any) -> Any:
        """Replace the optimizer's state; learning rates stay as they are.

        Args:
            state: State to install, as an earlier call returned it. None installs the state of a new optimizer.

        Returns:
            The state that was replaced, unaffected by later steps.
        """
        ...


class CorrectionExample(TrainingExample, Protocol):
    """A small training job whose plain loop can be corrected, for `correction_cases`."""

    @property
    def plain_sgd(self) -> bool:
        """Whether the optimizer is SGD without momentum, for which SCAFFOLD uses its option II."""
        ...

    def plain(self, site: int, *, total_steps: int) -> CorrectedLoop:
        """Build the same training without fl-adapters, with the same seeds.

        Args:
            site: Number of the site: 0 or 1.
            total_steps: Optimizer steps of the whole training, which a learning-rate schedule spans.

        Returns:
            The loop, before its first step, with `correct` set to None.
        """
        ...


CorrectionCase: TypeAlias = Callable[[CorrectionExample], None]


def correction_cases() -> tuple[CorrectionCase, ...]:
    """All cases for corrected gradients and personal models, as functions that take a `CorrectionExample`.

    Each compares the final global model with plain loops under the strategy's formulas. Ditto's personal models are
    compared too.

    Returns:
        The cases. A case raises AssertionError if the adapter breaks its promise.

    Example:
        >>> @pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
        ... def test_corrections(case):
        ...     case(Example())
    """
    return (
        fedprox_equals_a_plain_loop,
        what_stays_at_the_site_is_not_corrected,
        scaffold_equals_a_plain_loop,
        ditto_equals_a_plain_loop,
    )


def fedprox_equals_a_plain_loop(example: CorrectionExample) -> None:
    final, _ = _federated(example, "fedprox:mu=0.5")
    require_close(final, _fedprox(example, 0.5, list(final)))


def what_stays_at_the_site_is_not_corrected(example: CorrectionExample) -> None:
    final, _ = _federated(example, "fedprox:mu=0.5", keep_local=(example.personal,))
    names = [name for name in final if not matches(name, [example.personal])]
    require(names == list(final), f"{example.personal} matches what has reached the server")
    require_close(final, _fedprox(example, 0.5, names))


def scaffold_equals_a_plain_loop(example: CorrectionExample) -> None:
    final, _ = _federated(example, "scaffold")
    require_close(final, _scaffold(example, list(final)))


def ditto_equals_a_plain_loop(example: CorrectionExample) -> None:
    """The global model is that of FedAvg, and each site has a personal model."""
    final, personal = _federated(example, "ditto:lam=0.5", phases=2)
    expected, expected_personal = _ditto(example, 0.5, list(final))
    require_close(final, expected)
    for actual, by_hand in zip(personal, expected_personal, strict=True):
        shared_tensors = {name: array for name, array in by_hand.items() if name in actual}
        require(set(final) <= set(shared_tensors), f"the personal model has {sorted(actual)} only")
        require_close(actual, shared_tensors)
        require(
            any(actual[name].tobytes() != final[name].tobytes() for name in final),
            "the personal model equals the global model",
        )


def _federated(
    example: CorrectionExample, strategy: str, *, phases: int = 1, **settings: Any
) -> tuple[Arrays, list[dict[str, Array]]]:
    """Train in a federation. Returns the final global model and each site's personal model, if the strategy has one."""
    every = example.steps_per_epoch + 1  # rounds that end within epochs
    with LocalFederation(
        sites=2, states=example.states, rounds=_ROUNDS, every=every, strategy=strategy, **settings
    ) as federation:

        def site(place: Any) -> Trained:
            return example.train(place.index, kit=place.kit, epochs=100, num_examples=_EXAMPLES[place.index])

        trained = federation.run(site)
        final = federation.model()
        files = [federation.folder / "sites" / place.name / PERSONAL_FILE for place in federation.places]
        personal = [copied(read_tensors(file)) for file in files] if phases == 2 else []
        updates = [event.data["local_steps"] for event in federation.events if event.kind == "update"]
    for name, result in trained.items():
        require_same_bits({n: result.weights[n] for n in final}, final, f"the final weights of {name}: ")
        steps = _ROUNDS * every * phases
        require(result.steps == steps, f"{name} made {result.steps} optimizer steps instead of {steps}")
    require(updates == [every] * len(updates), f"the rounds had {updates} steps, not {every} each")
    return final, personal


class _HandLoops:
    """The plain loops of two sites, each with its own random states, and the average of their weights."""

    def __init__(self, example: CorrectionExample, names: list[str], phases: int = 1) -> None:
        self.every, self.names, self._states_of = example.steps_per_epoch + 1, names, example.states
        self._before = self._current_states()
        self.loops, self._states = [], []
        for site in range(2):
            self._set_states(self._before)
            self.loops.append(example.plain(site, total_steps=_ROUNDS * self.every * phases))
            self._states.append(self._current_states())
        self.weights = {name: np.array(self.loops[0].weights()[name]) for name in names}
        self._set_states(self._before)

    @contextmanager
    def turn(self, site: int) -> Iterator[CorrectedLoop]:
        """Give this block a site's loop, with its random states and the global weights in its model."""
        loop = self.loops[site]
        self._set_states(self._states[site])
        loop.load({**copied(loop.weights()), **self.weights})
        yield loop
        self._states[site] = self._current_states()
        self._set_states(self._before)

    def travelling(self, loop: CorrectedLoop) -> dict[str, Array]:
        """Copies of the tensors that travel."""
        return {name: np.array(loop.weights()[name]) for name in self.names}

    def average(self, states: list[dict[str, Array]]) -> None:
        """Make the weighted mean of the sites' weights the new global weights."""
        self.weights = mean_by_hand(states, _EXAMPLES)

    def _current_states(self) -> list[Any]:
        return [get() for get, _ in self._states_of]

    def _set_states(self, values: Sequence[Any]) -> None:
        for (_, set_state), value in zip(self._states_of, values, strict=True):
            set_state(value)


def _proximal(mu: float, anchors: dict[str, Array]) -> Correct:
    def correct(name: str, weight: Array, gradient: Array) -> Array:
        return np.asarray(gradient + mu * (weight - anchors[name])) if name in anchors else gradient

    return correct


def _controlled(c: dict[str, Array], own: dict[str, Array], names: list[str], seen: dict[str, list[Array]]) -> Correct:
    """SCAFFOLD's correction with control variates `c` and `own`. Appends the uncorrected gradients to `seen`."""

    def correct(name: str, weight: Array, gradient: Array) -> Array:
        if name not in names:
            return gradient
        seen.setdefault(name, []).append(np.array(gradient, np.float32))
        return np.asarray(gradient + c.get(name, 0.0) - own.get(name, 0.0))

    return correct


def _fedprox(example: CorrectionExample, mu: float, names: list[str]) -> dict[str, Array]:
    hand = _HandLoops(example, names)
    for _ in range(_ROUNDS):
        states = []
        for site in range(2):
            with hand.turn(site) as loop:
                loop.correct = _proximal(mu, hand.weights)
                loop.train(hand.every)
                states.append(hand.travelling(loop))
        hand.average(states)
    return hand.weights


def _scaffold(example: CorrectionExample, names: list[str]) -> dict[str, Array]:
    """SCAFFOLD, Karimireddy et al. 2020, Algorithm 1: option II for plain SGD, else the mean of the gradients."""
    hand = _HandLoops(example, names)
    share = [n / sum(_EXAMPLES) for n in _EXAMPLES]
    c: dict[str, Array] = {}
    own: list[dict[str, Array]] = [{}, {}]
    for _ in range(_ROUNDS):
        states, changes = [], []
        for site in range(2):
            seen: dict[str, list[Array]] = {}

            with hand.turn(site) as loop:
                loop.correct = _controlled(c, own[site], names, seen)
                before = len(loop.rates)
                loop.train(hand.every)
                after = hand.travelling(loop)
                rate = sum(loop.rates[before:])
            following = {name: np.mean(gradients, axis=0) for name, gradients in seen.items()}
            if example.plain_sgd:
                following = {
                    name: own[site].get(name, 0.0) - c.get(name, 0.0) + (hand.weights[name] - after[name]) / rate
                    for name in seen
                }
            changes.append({name: new - own[site].get(name, 0.0) for name, new in following.items()})
            own[site] = following
            states.append(after)
        hand.average(states)
        c = {n: c.get(n, 0.0) + sum(p * change[n] for p, change in zip(share, changes, strict=True)) for n in own[0]}
    return hand.weights


def _ditto(
    example: CorrectionExample, lam: float, names: list[str]
) -> tuple[dict[str, Array], tuple[dict[str, Array], dict[str, Array]]]:
    """Ditto, Li et al. 2021, Algorithm 1. Returns the global weights and each site's personal weights."""
    hand = _HandLoops(example, names, phases=2)
    personal: list[dict[str, Array]] = [{}, {}]
    optimizers: list[Any] = [None, None]
    for _ in range(_ROUNDS):
        states = []
        for site in range(2):
            with hand.turn(site) as loop:
                personal[site] = personal[site] or copied(loop.weights())
                loop.correct = None
                loop.train(hand.every)
                states.append(hand.travelling(loop))
                mine = copied(loop.weights())
                of_the_global = loop.exchange_optimizer(optimizers[site])
                loop.load(personal[site])
                loop.correct = _proximal(lam, hand.weights)
                loop.train(hand.every)
                personal[site] = copied(loop.weights())
                optimizers[site] = loop.exchange_optimizer(of_the_global)
                loop.load(mine)
        hand.average(states)
    return hand.weights, (personal[0], personal[1])
