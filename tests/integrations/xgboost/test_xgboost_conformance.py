"""The conformance suite for whole trainings, as far as it applies to trees. A step is a round of boosting.

These cases cannot apply:

- `equals_a_plain_loop_*` and `local_tensors_stay` compare means and parts of tensors. Trees have neither;
  test_xgboost_bagging.py has their plain loop.
- `a_site_that_fails_is_done_without` reads the server's model as tensors; test_xgboost_killed_sites.py tests the same.
- `a_site_that_is_not_drawn_waits`: trees need all sites in every round.
- All of `adapter_cases` expect tensors of the same names and shapes in every round, copied in place. A model of
  trees travels as one growing document.

In cyclic mode a site trains in some rounds only, and histogram mode needs its sites at once; the suite expects all
rounds, and runs one site at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d

from fl_adapters.testing import Trained, TrainingCase, failing, training_cases
from fl_adapters.xgboost import train

PARAMS = d.BASE | {"base_score": 0.0}
LEFT_OUT = {
    "equals_a_plain_loop_with_kept_optimizer",
    "equals_a_plain_loop_with_reset_optimizer",
    "local_tensors_stay",
    "a_second_training_is_a_run_of_its_own",  # test_xgboost_trainings.py
    "a_site_that_fails_is_done_without",
    "a_site_that_is_not_drawn_waits",
}
CASES = [case for case in training_cases() if case.__name__ not in LEFT_OUT]


def document(booster: xgboost.Booster) -> dict[str, Any]:
    return {"model": np.frombuffer(booster.save_raw("ubj"), np.uint8)}


class Trees:
    """The training job of the suite."""

    steps_per_epoch, personal, states = 1, "", ()

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        calls, gradients = 0, d.logistic()

        def objective(margins: Any, data: xgboost.DMatrix) -> Any:
            nonlocal calls
            calls += 1
            if fail_at and calls > fail_at:  # the first call is for the base score
                failing()
            return gradients(margins, data)

        objective.__name__ = "logistic"
        data = d.matrix(site, x=d.X[:, :3] if different else d.X)
        booster = train(PARAMS, data, epochs, obj=objective, **arguments)
        return Trained(document(booster), booster.num_boosted_rounds())

    def plain(self, site: int, *, total_steps: int) -> Any:
        return Plain(site)


class Plain:
    def __init__(self, site: int) -> None:
        self._data = d.matrix(site)
        self._booster = xgboost.Booster(PARAMS, [self._data])

    def train(self, steps: int) -> None:
        for iteration in range(steps):
            self._booster.update(self._data, iteration, fobj=d.logistic())

    def weights(self) -> dict[str, Any]:
        return document(self._booster)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_conformance(case: TrainingCase) -> None:
    case(Trees())  # type: ignore[arg-type]


def test_what_is_left_out_is_there() -> None:
    assert {case.__name__ for case in training_cases()} > LEFT_OUT
