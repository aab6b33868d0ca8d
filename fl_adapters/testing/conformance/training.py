"""What a whole federated training must do in every framework: one case per promise; public in testing.py.

The framework under test gives a small training job of its own (`TrainingExample`); the cases run it in a
`LocalFederation`, its sites one at a time in threads, and beside it a plain loop that averages by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from fl_adapters.participant.exchange import matches
from fl_adapters.testing.conformance.adapter import copied, mean_by_hand, require, require_close, require_same_bits
from fl_adapters.testing.local_federation import LocalFederation, State
from fl_runtime.errors import ConfigError, HandshakeError, QuorumError
from fl_runtime.types import Array, Arrays, Event

_FAILING = "this site was told to fail"


@dataclass(frozen=True)
class Trained:
    """What a training call has left. weights: every tensor of the model, the caller's own. steps: of the optimizer."""

    weights: Arrays
    steps: int


class PlainLoop(Protocol):
    """One site's training without fl-adapters: the same model, data, order and schedule, driven from outside."""

    @property
    def num_examples(self) -> int:
        """Rows of its training set: its weight in the average."""
        ...

    def weights(self) -> Arrays:
        """Every tensor of the model."""
        ...

    def load(self, arrays: Arrays) -> None:
        """Set those tensors; the optimizer stays as it is."""
        ...

    def reset_optimizer(self) -> None:
        """Moments and step counters to zero, the schedule untouched."""
        ...

    def train(self, steps: int) -> None:
        """So many further optimizer steps."""
        ...


class TrainingExample(Protocol):
    """A small training job, of less than a second. Plain attributes do for the three properties."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same at every site."""
        ...

    @property
    def personal(self) -> str:
        """A pattern that matches some, but not all, of the floating tensors."""
        ...

    @property
    def states(self) -> Sequence[State]:
        """What belongs to the process but must not be shared by sites, such as the framework's random state."""
        ...

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        """Seed for `site`, build model, data and trainer, run the framework's own call with the callback made from
        `arguments` (kit, every, ...).

        epochs: the trainer's own budget. different: build another model than the others. fail_at: call
        `failing()` in the user's code (a data set, a forward pass) at this optimizer step, counted from 1.
        """
        ...

    def plain(self, site: int, *, total_steps: int) -> PlainLoop:
        """The same without fl-adapters, seeded alike; total_steps: what a schedule is sized for."""
        ...


TrainingCase: TypeAlias = Callable[[TrainingExample], None]


def training_cases() -> tuple[TrainingCase, ...]:
    """All cases, for `pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)`."""
    return (
        equals_a_plain_loop_with_kept_optimizer,
        equals_a_plain_loop_with_reset_optimizer,
        a_budget_in_steps_is_exact,
        a_budget_in_epochs_is_exact,
        the_trainers_own_budget_decides_without_rounds,
        local_tensors_stay,
        alone_the_script_trains_as_if_nothing_were_there,
        required_refuses_to_train_alone,
        another_model_is_refused_before_the_first_step,
        a_site_that_is_not_drawn_waits,
        a_site_that_fails_is_done_without,
        a_site_that_is_needed_ends_the_run,
    )


def check_training(example: TrainingExample) -> None:
    """Run every case. Raises AssertionError naming the first that fails."""
    for case in training_cases():
        try:
            case(example)
        except AssertionError as error:
            raise AssertionError(f"{case.__name__}: {error}") from error


def failing() -> None:
    """What the code of a site that is to fail calls."""
    raise RuntimeError(_FAILING)


def equals_a_plain_loop_with_kept_optimizer(example: TrainingExample) -> None:
    _equals_plain_loop(example, "keep")


def equals_a_plain_loop_with_reset_optimizer(example: TrainingExample) -> None:
    _equals_plain_loop(example, "reset")


def a_budget_in_steps_is_exact(example: TrainingExample) -> None:
    with _federation(example, rounds=3) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, every=2, epochs=100))
        federation.result()
    _require_steps(trained, 6)
    _require_local_steps(federation.events, 2)


def a_budget_in_epochs_is_exact(example: TrainingExample) -> None:
    with _federation(example, rounds=2, every="2 epochs") as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=100))
        federation.result()
    _require_steps(trained, 4 * example.steps_per_epoch)
    _require_local_steps(federation.events, 2 * example.steps_per_epoch)


def the_trainers_own_budget_decides_without_rounds(example: TrainingExample) -> None:
    with _federation(example) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=3))
        rounds = len(federation.result().rounds)
    require(rounds == 3, f"3 epochs of one round each became {rounds} rounds")
    _require_steps(trained, 3 * example.steps_per_epoch)


def local_tensors_stay(example: TrainingExample) -> None:
    patterns = [example.personal]
    with _federation(example, rounds=2) as federation:
        trained = federation.run(
            lambda place: example.train(place.index, kit=place.kit, keep_local=patterns, epochs=100)
        )
        model = federation.model()
    first, second = (t.weights for t in trained.values())
    kept = [name for name in first if matches(name, patterns)]
    require(bool(kept), f"{patterns} matches none of {list(first)}")
    travelled = [name for name in kept if name in model]
    require(not travelled, f"{travelled} reached the server in spite of keep_local")
    require(any(first[n].tobytes() != second[n].tobytes() for n in kept), "the sites' own tensors are the same")
    for name in model:
        require(first[name].tobytes() == second[name].tobytes(), f"{name} differs between the sites after training")


def alone_the_script_trains_as_if_nothing_were_there(example: TrainingExample) -> None:
    before = [get() for get, _ in example.states]
    trained = example.train(0, epochs=2)
    _restore(example.states, before)
    steps = 2 * example.steps_per_epoch
    plain = example.plain(0, total_steps=steps)
    plain.train(steps)
    _restore(example.states, before)
    require(trained.steps == steps, f"{trained.steps} steps in place of {steps}")
    require_close(trained.weights, copied(plain.weights()))


def required_refuses_to_train_alone(example: TrainingExample) -> None:
    try:
        example.train(0, epochs=1, required=True)
    except ConfigError as error:
        require("kit" in str(error), f"the error does not say what is missing: {error}")
    else:
        raise AssertionError("required=True trained without a startup kit")


def another_model_is_refused_before_the_first_step(example: TrainingExample) -> None:
    with _federation(example, rounds=2) as federation:
        work = {
            place.name: lambda place: example.train(place.index, kit=place.kit, epochs=9, different=place.index == 1)
            for place in federation.places
        }
        outcomes = federation.outcomes(work, check=False)
    for name, outcome in outcomes.items():
        require(isinstance(outcome.error, HandshakeError), f"{name} got {outcome.error!r} and no HandshakeError")
        require("site-1" in str(outcome.error), f"the error does not name the sites: {outcome.error}")
    require(not _of_kind(federation.events, "round_started"), "a round was started")


def a_site_that_is_not_drawn_waits(example: TrainingExample) -> None:
    rounds, every = 2 * example.steps_per_epoch, example.steps_per_epoch + 1  # whole epochs, in all
    with _federation(example, rounds=rounds, every=every, fraction=0.5, seed=2, min_sites=1) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=100))
        final = federation.model()
        drawn = [[list(trained).index(name) for name in result.sites] for result in federation.result().rounds]
    require(sorted({len(sites) for sites in drawn}) == [1] and len({*map(tuple, drawn)}) == 2, f"drawn were {drawn}")
    for name, result in trained.items():
        require_same_bits({n: result.weights[n] for n in final}, final, f"the final weights of {name}: ")
    _require_local_steps(federation.events, every)
    require_close(final, by_hand(example, "keep", drawn, every, list(final)).final)


def a_site_that_fails_is_done_without(example: TrainingExample) -> None:
    with _federation(example, rounds=3, every=2, min_sites=1) as federation:
        outcomes = federation.outcomes(
            {
                place.name: lambda place: example.train(
                    place.index, kit=place.kit, epochs=100, fail_at=3 if place.index == 1 else 0
                )
                for place in federation.places
            },
            check=False,
        )
        rounds = federation.result().rounds
        model = federation.model()
    alive, dead = outcomes["site-1"], outcomes["site-2"]
    require(_FAILING in str(dead.error), f"the failing site's own error was replaced by {dead.error!r}")
    require(alive.error is None, f"the other site failed too: {alive.error!r}")
    require(len(rounds) == 3 and rounds[-1].sites == ("site-1",), f"the rounds are {rounds}")
    assert alive.value is not None
    require_same_bits({name: alive.value.weights[name] for name in model}, model, "the final weights: ")


def a_site_that_is_needed_ends_the_run(example: TrainingExample) -> None:
    with _federation(example, rounds=3, every=2) as federation:
        outcomes = federation.outcomes(
            {
                place.name: lambda place: example.train(
                    place.index, kit=place.kit, epochs=100, fail_at=3 if place.index == 1 else 0
                )
                for place in federation.places
            },
            check=False,
        )
    require(_FAILING in str(outcomes["site-2"].error), f"the failing site raised {outcomes['site-2'].error!r}")
    error = outcomes["site-1"].error
    require(isinstance(error, QuorumError) and "site-2" in str(error), f"the other site raised {error!r}")


def _equals_plain_loop(example: TrainingExample, policy: Literal["keep", "reset"]) -> None:
    rounds, every = 3, example.steps_per_epoch + 1  # rounds that end within epochs
    with _federation(example, rounds=rounds, every=every, optimizer_state=policy) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=100))
        final = federation.model()
    for name, result in trained.items():
        missing = [tensor for tensor in final if tensor not in result.weights]
        require(not missing, f"{missing} of the global model are not among the weights of {name}")
        require_same_bits({n: result.weights[n] for n in final}, final, f"the final weights of {name}: ")
    wanted = by_hand(example, policy, [[0, 1]] * rounds, every, list(final))
    require_close(final, wanted.final)


@dataclass(frozen=True)
class ByHand:
    """final: the global model after the last round. own: by a site's number, all its weights as it sent the last."""

    final: dict[str, Array]
    own: dict[int, dict[str, Array]]


def by_hand(
    example: TrainingExample, policy: str, rounds: Sequence[Sequence[int]], every: int, names: list[str]
) -> ByHand:
    """The oracle: each site's plain loop in turn, with its own random states, and the mean in float64.

    rounds: the numbers of the sites that take part in each.
    """
    before = [get() for get, _ in example.states]
    loops, states, own = [], [], dict[int, dict[str, Array]]()
    for site in range(2):
        _restore(example.states, before)
        loops.append(example.plain(site, total_steps=len(rounds) * every))
        states.append([get() for get, _ in example.states])
    weights = {name: np.array(loops[0].weights()[name]) for name in names}
    for sites in rounds:
        for site in sites:
            loop = loops[site]
            _restore(example.states, states[site])
            loop.load({**copied(loop.weights()), **weights})
            if policy == "reset":
                loop.reset_optimizer()
            loop.train(every)
            states[site] = [get() for get, _ in example.states]
            own[site] = copied(loop.weights())
        sent = [{name: own[site][name] for name in names} for site in sites]
        weights = mean_by_hand(sent, tuple(loops[site].num_examples for site in sites))
    _restore(example.states, before)
    return ByHand(weights, own)


def _federation(example: TrainingExample, **settings: Any) -> LocalFederation:
    return LocalFederation(sites=2, states=example.states, **settings)


def _restore(states: Sequence[State], values: Sequence[Any]) -> None:
    for (_, set_state), value in zip(states, values, strict=True):
        set_state(value)


def _of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def _require_steps(trained: dict[str, Trained], steps: int) -> None:
    for name, result in trained.items():
        require(result.steps == steps, f"{name} made {result.steps} optimizer steps in place of {steps}")


def _require_local_steps(events: Sequence[Event], steps: int) -> None:
    """round 0: sites may give an initial model, which takes no steps."""
    found = [event.data["local_steps"] for event in _of_kind(events, "update") if event.round > 0]
    require(found == [steps] * len(found), f"the rounds had {found} optimizer steps, not {steps} each")
