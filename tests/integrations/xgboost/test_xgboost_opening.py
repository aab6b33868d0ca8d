"""`load()`: the trees of a run, in a Booster or in an estimator."""

from __future__ import annotations

import numpy as np
import pytest
import xgboost
import xgboost_data as d

from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train
from fl_runtime.errors import ConfigError, ProtocolError


def test_trees_open_in_a_booster_and_in_an_estimator() -> None:
    params = d.BASE | {"objective": "binary:logistic"}
    with LocalFederation(sites=2) as federation:
        boosters = federation.run(lambda place: train(params, d.matrix(place.index), 3, kit=place.kit))
        federation.result()
        wanted = boosters["site-1"].predict(d.matrix(None))
        np.testing.assert_array_equal(federation.load().predict(d.matrix(None)), wanted)
        pytest.importorskip("sklearn")
        classifier = federation.load(xgboost.XGBClassifier)
        np.testing.assert_array_equal(classifier.predict_proba(d.X)[:, 1], wanted)
        with pytest.raises(ConfigError, match="cannot be loaded into a DMatrix"):
            federation.load(d.matrix(0))
        file = federation.folder / "model" / "model.ubj"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ProtocolError):
            federation.load()
