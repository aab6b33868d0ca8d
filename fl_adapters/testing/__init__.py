"""Tools for authors of adapters and training loops: a federation inside one process, and the conformance suite.

    with LocalFederation(sites=2, rounds=3) as federation:
        weights = federation.run(lambda place: train(kit=place.kit))

The conformance suite holds every adapter to the same promises. Each promise is a case; each group of cases asks for an
example that the adapter's author writes:

- `adapter_cases` (all at once: `check_adapter`): reading and writing the state of a model.
- `training_cases` (all at once: `check_training`): a whole federated training, compared with a plain loop.
- `correction_cases`: strategies that change gradients or train personal models (FedProx, SCAFFOLD, Ditto).
- `cross_site_cases`: scoring other sites' models on a site's validation data.
- `restart_cases`: sites that are killed and restart exactly (`exact_restart`).

None of this needs pytest, sockets or a framework.
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
