"""Jobs whose filters, strategy and weights of sites contradict each other are refused when they are made."""

from __future__ import annotations

import pytest

from fl_adapters import Job
from fl_runtime.errors import ConfigError


def test_hidden_steps_with_fednova_are_refused() -> None:
    with pytest.raises(ConfigError, match="Examples hides the number of local steps, which fednova needs"):
        Job(app="train.py", sites=3, strategy="fednova", filters=({"name": "Examples", "multiple": 10},))
    Job(app="train.py", sites=3, strategy="fedavg", filters=({"name": "Examples", "multiple": 10},))
    Job(app="train.py", sites=3, strategy="fednova", filters=({"name": "RoundMetrics"},))


def test_weights_of_sites_with_central_noise_are_refused() -> None:
    local = {"name": "GaussianDP", "noise_multiplier": 1.0}
    central = {**local, "at": "server_in"}
    with pytest.raises(ConfigError, match="GaussianDP at server_in counts every site the same"):
        Job(app="train.py", sites=2, site_weights={"site-1": 2.0}, filters=(central,))
    Job(app="train.py", sites=2, filters=(central,))
    Job(
        app="train.py",
        sites=2,
        site_weights={"site-1": 2.0},
        filters=(local,),
    )
