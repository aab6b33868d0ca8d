"""Conformance cases for a whole federated training: one case per promise. Part of `fl_adapters.testing`.

An adapter's author writes a small training job (`TrainingExample`). The cases run it at two sites of a
`LocalFederation`, one at a time in threads, and compare the weights with a plain loop that averages by hand.
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
    """Result of `TrainingExample.train`.

    Attributes:
        weights: Every tensor of the model after the call, by the adapter's names, tensors that stay at the site
            included. Copies that later training does not change.
        steps: Number of optimizer steps that the call made.
    """

    weights: Arrays
    steps: int


class PlainLoop(Protocol):
    """One site's training without fl-adapters, driven step by step: the reference that results are compared with.

    It has the same model, data, order of batches, optimizer and schedule as `TrainingExample.train`.
    """

    @property
    def num_examples(self) -> int:
        """Number of rows in the site's training set, which is the site's weight in the average."""
        ...

    def weights(self) -> Arrays:
        """Return every tensor of the model.

        Returns:
            Arrays by tensor name. The suite copies them before the next call.
        """
        ...

    def load(self, arrays: Arrays) -> None:
        """Write weights into the model. The optimizer's state stays as it is.

        Args:
            arrays: Every tensor of the model, by name.
        """
        ...

    def reset_optimizer(self) -> None:
        """Set the optimizer's moments and step counters to zero. The learning-rate schedule keeps its position."""
        ...

    def train(self, steps: int) -> None:
        """Continue training for a number of optimizer steps, across epochs if need be.

        Args:
            steps: Number of optimizer steps.
        """
        ...


class TrainingExample(Protocol):
    """A small training job in the framework under test, for `training_cases`.

    It should train in less than a second. The three properties may be plain attributes. The cases call both methods for
    sites 0 and 1, possibly from different threads, but never at the same time.

    Example:
        >>> class Example:
        ...     steps_per_epoch = 4
        ...     personal = "head.*"
        ...     states = [(torch.get_rng_state, torch.set_rng_state)]
        ...
        ...     def train(self, site, *, epochs, different=False, fail_at=0, **arguments):
        ...         model, data = build(site, different)
        ...         trainer = Trainer(model, data, epochs, callbacks=[FederatedCallback(**arguments)])
        ...         trainer.train()
        ...         return Trained(weights_of(model), trainer.state.global_step)
    """

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch, the same at every site."""
        ...

    @property
    def personal(self) -> str:
        """Name pattern that matches some of the floating-point tensors, but not all. The cases keep these local."""
        ...

    @property
    def states(self) -> Sequence[State]:
        """Getters and setters of states that sites must not share, such as the framework's random state."""
        ...

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        """Train at one site with the framework's own call and the adapter's callback.

        Seed everything for `site`, then build model, data and trainer, and call `fit`, `train` or the like. All
        errors must leave this method, since the cases look at them.

        Args:
            site: Number of the site: 0 or 1. Seeds the weights and selects the data.
            epochs: The trainer's own budget, in epochs.
            different: Whether to build a model whose tensors differ in name or shape from those of other sites.
            fail_at: Optimizer step, counted from 1, in which the user's code (a data set, a forward pass) calls
                `failing()`. 0 for no failure.
            **arguments: Arguments for the callback, such as `kit`, `every`, `keep_local` and `agree`. Without `kit` the
                training runs outside a federation.

        Returns:
            Weights and steps after the call.
        """
        ...

    def plain(self, site: int, *, total_steps: int) -> PlainLoop:
        """Build the same training without fl-adapters, with the same seeds.

        Args:
            site: Number of the site: 0 or 1.
            total_steps: Optimizer steps of the whole training, which a learning-rate schedule spans.

        Returns:
            The loop, before its first step.
        """
        ...


TrainingCase: TypeAlias = Callable[[TrainingExample], None]


def training_cases() -> tuple[TrainingCase, ...]:
    """All cases for a whole training, as functions that take a `TrainingExample`.

    They compare weights with a plain loop, count optimizer steps, and check that a site with another model or other
    labels is refused, that a failing site is done without or ends the run, and that the script also trains alone.

    Returns:
        The cases. A case raises AssertionError if the adapter breaks its promise.

    Example:
        >>> @pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
        ... def test_training(case):
        ...     case(Example())
    """
    return (
        equals_a_plain_loop_with_kept_optimizer,
        equals_a_plain_loop_with_reset_optimizer,
        a_budget_in_steps_is_exact,
        a_budget_in_epochs_is_exact,
        the_trainers_own_budget_decides_without_rounds,
        a_second_training_is_a_run_of_its_own,
        local_tensors_stay,
        alone_the_script_trains_as_if_nothing_were_there,
        required_refuses_to_train_alone,
        another_model_is_refused_before_the_first_step,
        other_names_are_refused_before_the_first_step,
        a_site_that_is_not_drawn_waits,
        a_site_that_fails_is_done_without,
        a_site_that_is_needed_ends_the_run,
    )


def check_training(example: TrainingExample) -> None:
    """Run every case of `training_cases`.

    Args:
        example: The training job.

    Raises:
        AssertionError: A case fails; the message begins with the name of the first one.
    """
    for case in training_cases():
        try:
            case(example)
        except AssertionError as error:
            raise AssertionError(f"{case.__name__}: {error}") from error


def failing() -> None:
    """Raise the error that the cases expect of a failing site. `TrainingExample.train` calls it at step `fail_at`.

    Raises:
        RuntimeError: Always.
    """
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
    require(rounds == 3, f"a budget of 3 epochs became {rounds} rounds instead of 3")
    _require_steps(trained, 3 * example.steps_per_epoch)


def a_second_training_is_a_run_of_its_own(example: TrainingExample) -> None:
    """As in cross-validation: the script builds another model and trains again, here for longer."""
    epochs = (1, 2)
    with _federation(example) as federation:
        trained = federation.run(lambda place: [example.train(place.index, kit=place.kit, epochs=n) for n in epochs])
        models = [federation.model(training=number) for number in (1, 2)]
    for number, (rounds, final) in enumerate(zip(epochs, models, strict=True)):
        results = {name: trainings[number] for name, trainings in trained.items()}
        _require_steps(results, rounds * example.steps_per_epoch)
        for name, result in results.items():
            weights = {tensor: result.weights[tensor] for tensor in final}
            require_same_bits(weights, final, f"training {number + 1} of {name}: ")
        expected = by_hand(example, "keep", [[0, 1]] * rounds, example.steps_per_epoch, list(final))
        require_close(final, expected.final)


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
    require(not travelled, f"{travelled} reached the server despite keep_local")
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
    require(trained.steps == steps, f"{trained.steps} optimizer steps instead of {steps}")
    require_close(trained.weights, copied(plain.weights()))


def required_refuses_to_train_alone(example: TrainingExample) -> None:
    try:
        example.train(0, epochs=1, required=True)
    except ConfigError as error:
        require("kit" in str(error), f"the error does not say what is missing: {error}")
    else:
        raise AssertionError("required=True trained without a startup kit")


def another_model_is_refused_before_the_first_step(example: TrainingExample) -> None:
    _require_refusal(example, "site-1", [{}, {"different": True}])


def other_names_are_refused_before_the_first_step(example: TrainingExample) -> None:
    orders = [["cat", "dog"], ["dog", "cat"]]
    _require_refusal(example, "labels: 0: 'cat' != 'dog'", [{"agree": {"labels": order}} for order in orders])


def _require_refusal(example: TrainingExample, said: str, arguments: Sequence[dict[str, Any]]) -> None:
    """Train with these further arguments at each site, which must be refused before round 1 at all of them."""
    with _federation(example, rounds=2) as federation:
        work = {
            place.name: lambda place: example.train(place.index, kit=place.kit, epochs=9, **arguments[place.index])
            for place in federation.places
        }
        outcomes = federation.outcomes(work, check=False)
    for name, outcome in outcomes.items():
        require(isinstance(outcome.error, HandshakeError), f"{name} got {outcome.error!r} and no HandshakeError")
        require(said in str(outcome.error), f"the error does not say {said!r}: {outcome.error}")
    require(not _of_kind(federation.events, "round_started"), "a round was started")


def a_site_that_is_not_drawn_waits(example: TrainingExample) -> None:
    rounds, every = 2 * example.steps_per_epoch, example.steps_per_epoch + 1  # whole epochs in total
    with _federation(example, rounds=rounds, every=every, fraction=0.5, seed=2, min_sites=1) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=100))
        final = federation.model()
        drawn = [[list(trained).index(name) for name in result.sites] for result in federation.result().rounds]
    require(
        sorted({len(sites) for sites in drawn}) == [1] and len({*map(tuple, drawn)}) == 2,
        f"the sampled sites are {drawn}",
    )
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
    expected = by_hand(example, policy, [[0, 1]] * rounds, every, list(final))
    require_close(final, expected.final)


@dataclass(frozen=True)
class ByHand:
    """Result of a federated training that was computed by hand.

    Attributes:
        final: The global model after the last round.
        own: All weights of each site at the end of its last round, by the site's number.
    """

    final: dict[str, Array]
    own: dict[int, dict[str, Array]]


def by_hand(
    example: TrainingExample, policy: str, rounds: Sequence[Sequence[int]], every: int, names: list[str]
) -> ByHand:
    """Expected result of a federated training: plain loops with their own random states, averaged in float64.

    Args:
        example: The training job.
        policy: Optimizer policy at each exchange, "keep" or "reset".
        rounds: Numbers of the sites that take part in each round.
        every: Optimizer steps in a round.
        names: Names of the tensors that travel.

    Returns:
        The final global model, and each site's own weights.
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
        require(result.steps == steps, f"{name} made {result.steps} optimizer steps instead of {steps}")


def _require_local_steps(events: Sequence[Event], steps: int) -> None:
    """Check the steps that updates report. Round 0 is left out: an initial model takes no steps."""
    reported = [event.data["local_steps"] for event in _of_kind(events, "update") if event.round > 0]
    require(reported == [steps] * len(reported), f"the rounds had {reported} optimizer steps, not {steps} each")
