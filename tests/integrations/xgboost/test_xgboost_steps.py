"""How far a site is within a round: the trees that it has grown, of those of the round, on the screen."""

from __future__ import annotations

from typing import Any

import pytest
import xgboost
import xgboost_data as d
from shown_steps import row_of, wait_for_steps

from fl_adapters.testing import LocalFederation, Place
from fl_adapters.xgboost import train


@pytest.mark.parametrize("mode", ["bagging", "histogram"])
def test_the_screen_shows_how_many_trees_of_the_round_are_grown(mode: str) -> None:
    with LocalFederation(sites=2, rounds=1) as federation:

        def site(place: Place) -> xgboost.Booster:
            calls = 0

            def squared_error(margins: Any, data: xgboost.DMatrix) -> Any:
                nonlocal calls
                calls += 1
                if calls == 5:  # three trees are grown, and the first call was for the base score
                    wait_for_steps(federation, place.name, 3)
                error = margins - d.matrix(place.index).get_label()
                return error, error * 0 + 1

            params = d.BASE | {"objective": "reg:squarederror", "base_score": 0.5}
            matrix = d.matrix(place.index)
            return train(params, matrix, 5, obj=squared_error, mode=mode, every=5, kit=place.kit)

        federation.run(site, timeout_s=60)
        federation.result()
        events = federation.events

    for name in ("site-1", "site-2"):
        row = row_of(events, name, 3)
        assert row[1] == "training" and "3/5" in row
