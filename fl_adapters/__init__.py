"""fl-adapters: a training script becomes a participant in a federation with one added line.

Import a callback for your framework, such as `from fl_adapters.hf import FederatedCallback`, or use `connect()` in a
training loop of your own. All names here are loaded on first use, so importing the package is quick and imports no
training framework.
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from fl_runtime.errors import (
    AbortedError,
    ConfigError,
    ConnectionLostError,
    FederationError,
    HandshakeError,
    PermissionDeniedError,
    PrivacyBudgetError,
    ProtocolError,
    QuorumError,
    SiteFailedError,
    StateMismatchError,
    StoreError,
    TransferDamagedError,
    UpdateRefusedError,
)
from fl_runtime.version import VERSION as _VERSION

if TYPE_CHECKING:
    from fl_adapters.environments.production import Production
    from fl_adapters.environments.proof_of_concept import ProofOfConcept
    from fl_adapters.environments.simulation import Simulation
    from fl_adapters.job import Job
    from fl_adapters.loop import ConnectedSite, SiteTask, Sums, connect, sums
    from fl_adapters.participant.identity import Site, site
    from fl_adapters.participant.local_work.dp_sgd import DPSGD
    from fl_runtime.aggregation import (
        CoordinateMedian,
        Cyclic,
        Ditto,
        FedAdagrad,
        FedAdam,
        FedAvg,
        FedAvgM,
        FedBuff,
        FedExLoRA,
        FedIT,
        FedNova,
        FedProx,
        FedSALoRA,
        FedYogi,
        FFALoRA,
        FlexLoRA,
        FLoRA,
        Krum,
        NormBounding,
        RoLoRA,
        Scaffold,
        Swarm,
        TrimmedMean,
    )

__all__ = [
    "DPSGD",
    "AbortedError",
    "ConfigError",
    "ConnectedSite",
    "ConnectionLostError",
    "CoordinateMedian",
    "Cyclic",
    "Ditto",
    "FFALoRA",
    "FLoRA",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedExLoRA",
    "FedIT",
    "FedNova",
    "FedProx",
    "FedSALoRA",
    "FedYogi",
    "FederationError",
    "FlexLoRA",
    "HandshakeError",
    "Job",
    "Krum",
    "NormBounding",
    "PermissionDeniedError",
    "PrivacyBudgetError",
    "Production",
    "ProofOfConcept",
    "ProtocolError",
    "QuorumError",
    "RoLoRA",
    "Scaffold",
    "Simulation",
    "Site",
    "SiteFailedError",
    "SiteTask",
    "StateMismatchError",
    "StoreError",
    "Sums",
    "Swarm",
    "TransferDamagedError",
    "TrimmedMean",
    "UpdateRefusedError",
    "__version__",
    "connect",
    "open_run",
    "site",
    "sums",
]

__version__ = _VERSION

_LAZY = {
    "ConnectedSite": "fl_adapters.loop",
    "CoordinateMedian": "fl_runtime.aggregation",
    "Cyclic": "fl_runtime.aggregation",
    "DPSGD": "fl_adapters.participant.local_work.dp_sgd",
    "Ditto": "fl_runtime.aggregation",
    "FFALoRA": "fl_runtime.aggregation",
    "FLoRA": "fl_runtime.aggregation",
    "FedAdagrad": "fl_runtime.aggregation",
    "FedAdam": "fl_runtime.aggregation",
    "FedAvg": "fl_runtime.aggregation",
    "FedAvgM": "fl_runtime.aggregation",
    "FedBuff": "fl_runtime.aggregation",
    "FedExLoRA": "fl_runtime.aggregation",
    "FedIT": "fl_runtime.aggregation",
    "FedNova": "fl_runtime.aggregation",
    "FedProx": "fl_runtime.aggregation",
    "FedSALoRA": "fl_runtime.aggregation",
    "FedYogi": "fl_runtime.aggregation",
    "FlexLoRA": "fl_runtime.aggregation",
    "Job": "fl_adapters.job",
    "Krum": "fl_runtime.aggregation",
    "NormBounding": "fl_runtime.aggregation",
    "Production": "fl_adapters.environments.production",
    "ProofOfConcept": "fl_adapters.environments.proof_of_concept",
    "RoLoRA": "fl_runtime.aggregation",
    "Scaffold": "fl_runtime.aggregation",
    "Swarm": "fl_runtime.aggregation",
    "Simulation": "fl_adapters.environments.simulation",
    "Site": "fl_adapters.participant.identity",
    "Sums": "fl_adapters.loop",
    "SiteTask": "fl_adapters.loop",
    "TrimmedMean": "fl_runtime.aggregation",
    "connect": "fl_adapters.loop",
    "open_run": "fl_adapters.environments.report.saved_run",
    "site": "fl_adapters.participant.identity",
    "sums": "fl_adapters.loop",
}

# In a source checkout the integrations lie beside this package; in a wheel they are inside it.
_beside = _os.path.join(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))), "integrations")
if _os.path.isdir(_beside):
    __path__.append(_beside)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fl_adapters' has no attribute {name!r}")
    value = getattr(_import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
