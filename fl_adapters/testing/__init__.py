"""For those who write adapters and training loops: a whole federation inside one process, and the conformance suite.

    with LocalFederation(sites=2, rounds=3) as federation:
        weights = federation.run(lambda place: train(kit=place.kit))

`check_adapter` and `check_training` hold every adapter to the same standard; `adapter_cases` and `training_cases` give
their cases one by one, for a test each, and `correction_cases` those of an adapter that corrects gradients and trains
personal models, `cross_site_cases` those of one that scores other sites' models, `restart_cases` those of one that
restarts exactly. None of this needs pytest, sockets or a framework.
"""

from __future__ import annotations

from fl_adapters.testing.conformance.adapter import AdapterCase, AdapterExample, adapter_cases, check_adapter
from fl_adapters.testing.conformance.corrections import (
    Correct,
    CorrectedLoop,
    CorrectionCase,
    CorrectionExample,
    correction_cases,
)
from fl_adapters.testing.conformance.cross_site import CrossSiteCase, ScoredExample, cross_site_cases
from fl_adapters.testing.conformance.restart import RestartCase, restart_cases
from fl_adapters.testing.conformance.training import (
    PlainLoop,
    Trained,
    TrainingCase,
    TrainingExample,
    check_training,
    failing,
    training_cases,
)
from fl_adapters.testing.local_federation import Death, LocalFederation, Outcome, Place

__all__ = [
    "AdapterCase",
    "AdapterExample",
    "Correct",
    "CorrectedLoop",
    "CorrectionCase",
    "CorrectionExample",
    "CrossSiteCase",
    "Death",
    "LocalFederation",
    "Outcome",
    "Place",
    "PlainLoop",
    "RestartCase",
    "ScoredExample",
    "Trained",
    "TrainingCase",
    "TrainingExample",
    "adapter_cases",
    "check_adapter",
    "check_training",
    "correction_cases",
    "cross_site_cases",
    "failing",
    "restart_cases",
    "training_cases",
]
