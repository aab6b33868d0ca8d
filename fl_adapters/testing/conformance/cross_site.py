"""Conformance cases for cross-site evaluation: scoring every site's model on every site's validation data.

Part of `fl_adapters.testing`. The expected scores come from plain loops without a federation, whose weights the example
itself scores on each site's data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from fl_adapters.participant.exchange import matches
from fl_adapters.testing.conformance.adapter import require, require_close, require_same_bits
from fl_adapters.testing.conformance.training import ByHand, Trained, TrainingExample, by_hand
from fl_adapters.testing.local_federation import LocalFederation
from fl_runtime.errors import HandshakeError
from fl_runtime.types import Arrays

_ROUNDS = 3
_TOLERANCE = 1e-5


class ScoredExample(TrainingExample, Protocol):
    """A small training job with validation data at every site, for `cross_site_cases`.

    The sites' validation data must differ. The training scores each arriving global model on it. Validation must not
    draw from the random states that training uses, since the plain loop does not validate.
    """

    def score(self, site: int, weights: Arrays) -> Mapping[str, float]:
        """Score weights on a site's validation data, without the adapter.

        Args:
            site: Number of the site whose data is used: 0 or 1.
            weights: Every tensor of the model, by name.

        Returns:
            Metrics under the names that the adapter reports.
        """
        ...


CrossSiteCase: TypeAlias = Callable[[ScoredExample], None]


def cross_site_cases() -> tuple[CrossSiteCase, ...]:
    """All cases for cross-site evaluation, as functions that take a `ScoredExample`.

    They compare the matrix of scores (a row per model, a column per site's data) with scores of plain loops, and
    check that the final weights are untouched and that a site without validation is refused.

    Returns:
        The cases. A case raises AssertionError if the adapter breaks its promise.

    Example:
        >>> @pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
        ... def test_cross_site(case):
        ...     case(Example())
    """
    return (
        every_model_is_scored_on_every_sites_data,
        layers_that_stay_are_those_of_the_site_that_scores,
        a_site_that_does_not_evaluate_is_refused_before_round_1,
    )


def every_model_is_scored_on_every_sites_data(example: ScoredExample) -> None:
    """The final weights are back afterwards, bit for bit, and the scores of the run's rounds are unaffected."""
    final, trained, matrix, scored = _federated(example)
    for name, result in trained.items():
        require_same_bits({n: result.weights[n] for n in final}, final, f"the final weights of {name}: ")
    hand = by_hand(example, "keep", [[0, 1]] * _ROUNDS, example.steps_per_epoch + 1, list(final))
    require_close(final, hand.final)
    _require_matrix(matrix, _matrix_by_hand(example, hand, list(final)))
    require(scored == list(range(1, _ROUNDS + 1)), f"site-1 reported scores of the global models {scored}")


def layers_that_stay_are_those_of_the_site_that_scores(example: ScoredExample) -> None:
    final, _, matrix, _ = _federated(example, keep_local=(example.personal,))
    require(not any(matches(name, [example.personal]) for name in final), f"{example.personal} reached the server")
    hand = by_hand(example, "keep", [[0, 1]] * _ROUNDS, example.steps_per_epoch + 1, list(final))
    _require_matrix(matrix, _matrix_by_hand(example, hand, list(final)))


def a_site_that_does_not_evaluate_is_refused_before_round_1(example: ScoredExample) -> None:
    def site(place: Any) -> Trained:
        arguments = {"evaluate_global": False} if place.index == 1 else {}
        return example.train(place.index, kit=place.kit, epochs=100, **arguments)

    with LocalFederation(sites=2, states=example.states, rounds=_ROUNDS, cross_site=True) as federation:
        outcomes = federation.outcomes({place.name: site for place in federation.places}, check=False)
    for name, outcome in outcomes.items():
        require(isinstance(outcome.error, HandshakeError), f"{name} got {outcome.error!r} and no HandshakeError")
        require("cross-evaluation" in str(outcome.error), f"the error does not say what is missing: {outcome.error}")
        require("site-2" in str(outcome.error), f"the error does not name the site: {outcome.error}")
    require(not [e for e in federation.events if e.kind == "round_started"], "a round was started")


def _federated(
    example: ScoredExample, **settings: Any
) -> tuple[Arrays, dict[str, Trained], Mapping[str, Any], Sequence[int]]:
    """Train in a federation. Returns the final model, the sites' results, the matrix, and the rounds site-1 scored."""
    every = example.steps_per_epoch + 1  # rounds that end within epochs
    with LocalFederation(
        sites=2, states=example.states, rounds=_ROUNDS, every=every, cross_site=True, **settings
    ) as federation:
        trained = federation.run(lambda place: example.train(place.index, kit=place.kit, epochs=100))
        federation.result()
        final = federation.model()
    for name, result in trained.items():
        steps = _ROUNDS * every
        require(result.steps == steps, f"{name} made {result.steps} optimizer steps instead of {steps}")
    matrices = [event.data["matrix"] for event in federation.events if event.kind == "cross_site"]
    require(len(matrices) == 1, f"the run has {len(matrices)} cross-site matrices instead of 1")
    scored = [e.round for e in federation.events if e.kind == "report" and e.site == "site-1"]
    return final, trained, matrices[0], scored


def _matrix_by_hand(
    example: ScoredExample, hand: ByHand, names: list[str]
) -> dict[str, dict[str, Mapping[str, float]]]:
    """Expected matrix. Tensors that stay at a site are those of the site whose data is used."""
    models = {f"site-{site + 1}": own for site, own in hand.own.items()}
    return {
        model: {
            f"site-{site + 1}": example.score(site, {**own, **{name: weights[name] for name in names}})
            for site, own in hand.own.items()
        }
        for model, weights in {"global": hand.final, **models}.items()
    }


def _require_matrix(
    actual: Mapping[str, Mapping[str, Mapping[str, float]]], expected: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> None:
    require(sorted(actual) == sorted(expected), f"the models are {sorted(actual)} and not {sorted(expected)}")
    for model, row in expected.items():
        require(sorted(actual[model]) == sorted(row), f"{model} was scored by {sorted(actual[model])}")
        for site, metrics in row.items():
            for metric, value in metrics.items():
                got = actual[model][site].get(metric)
                close = got is not None and np.isclose(got, value, rtol=_TOLERANCE, atol=_TOLERANCE)
                require(bool(close), f"the {metric} of {model} on the data of {site} is {got} and not {value}")
