"""Conformance cases for `exact_restart`: one case per moment at which a site dies. Part of `fl_adapters.testing`.

A site's training call ends by an error that the server does not hear of, and the same call starts again. This is what a
killed and restarted process does, except that this process keeps its memory, which must not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_adapters.testing.conformance.adapter import require, require_same_bits
from fl_adapters.testing.conformance.training import TrainingExample
from fl_adapters.testing.local_federation import Death, LocalFederation, Place
from fl_runtime.types import Arrays, Settings

_ROUNDS = 3


@dataclass(frozen=True)
class RestartCase:
    """A run of two sites in which some die and start again. Call it with a `TrainingExample`.

    Attributes:
        name: Name of the case, such as "killed while it trains".
        deaths: Which sites die, and in which calls.
        in_training: Whether a site fails in its own code, in the second epoch.
        settings: Further settings of the job, such as its strategy.
    """

    name: str
    deaths: Sequence[Death]
    in_training: bool = False
    settings: Settings = field(default_factory=dict)

    def __call__(self, example: TrainingExample) -> None:
        """Compare the run with one in which no site dies, bit for bit.

        Args:
            example: The training job. All of its sites run under `exact_restart`.

        Raises:
            AssertionError: The global model or a site's weights differ.
        """
        expected, expected_own = _run(example, (), 0, self.settings)
        fail_at = example.steps_per_epoch + 2 if self.in_training else 0
        actual, own = _run(example, self.deaths, fail_at, self.settings)
        require_same_bits(actual, expected, "the global model after a restart: ")
        for name, weights in expected_own.items():
            require_same_bits(own[name], weights, f"the weights of {name} after a restart: ")


def restart_cases(**settings: Any) -> tuple[RestartCase, ...]:
    """All cases for exact restarts, to be called with a `TrainingExample`.

    Args:
        **settings: Further settings of the job, such as its strategy.

    Returns:
        The cases. A case raises AssertionError if a restart changes the result.

    Example:
        >>> @pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
        ... def test_restart(case):
        ...     case(Example())
    """
    again = (
        Death("site-1", "Submit", 2),
        Death("site-1", "Submit", 3, heard=True),
        Death("site-2", "Submit", 3),
        Death("site-2", "Submit", 4),
    )
    return (
        RestartCase("killed while it trains", [Death("site-2")], True, settings),
        RestartCase("killed before the initial model is sent", [Death("site-1", "Submit", 1)], False, settings),
        RestartCase("killed with its update not sent", [Death("site-2", "Submit", 2)], False, settings),
        RestartCase("killed with its update accepted", [Death("site-2", "Submit", 1, heard=True)], False, settings),
        RestartCase("killed with a task not begun", [Death("site-2", "Next", 2, heard=True)], False, settings),
        RestartCase("killed after the last round", [Death("site-2", "Submit", _ROUNDS, heard=True)], False, settings),
        RestartCase("killed again and again", again, False, settings),
    )


def _run(
    example: TrainingExample, deaths: Sequence[Death], fail_at: int, settings: Settings
) -> tuple[Arrays, dict[str, Arrays]]:
    deaths_left = {site: sum(death.site == site for death in deaths) for site in ("site-1", "site-2")}

    def site(place: Place) -> Arrays:
        fails = fail_at if deaths_left[place.name] else 0
        while True:
            try:
                arguments: dict[str, Any] = {"kit": place.kit, "epochs": 100}
                if example.personal:
                    arguments["keep_local"] = [example.personal]
                return example.train(place.index, fail_at=fails, **arguments).weights
            except Exception as error:
                if not deaths_left[place.name]:
                    raise
                deaths_left[place.name], fails = deaths_left[place.name] - 1, 0
                require("died" in str(error) or "told to fail" in str(error), f"{place.name} failed: {error!r}")

    exact: dict[str, Any] = {"rounds": _ROUNDS, "exact_restart": True, **settings}
    with LocalFederation(sites=2, states=example.states, deaths=deaths, **exact) as federation:
        own = federation.run(site)
        require(len(federation.result().rounds) == _ROUNDS, "the run ended before its last round")
        require(not any(deaths_left.values()), f"these deaths did not happen: {deaths_left}")
        exported = federation.server.export(federation.folder / "final")
        require(exported is not None, "there is no global model")
        return {"model": np.fromfile(str(exported), np.uint8)}, own
