"""Filters beneath an HF Trainer: the script does not know of them, and the run ends with the server's model."""

from __future__ import annotations

from pathlib import Path

import hf_models as m
import numpy as np
import pytest

from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.kit import read_kit
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import PrivacyBudgetError
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.filters.ledger import Ledger

CHAINS = {
    "few bytes": [{"name": "TopK", "small": 0}, {"name": "Quantize"}, {"name": "Quantize", "at": "server_out"}],
    "heuristics": [{"name": "PercentilePrivacy"}, {"name": "AllowMetrics"}, {"name": "Examples", "equal": True}],
    "noise": [{"name": "GaussianDP", "clip": 0.1, "noise_multiplier": 0.01}, {"name": "NoisyMetrics", "high": 10}],
    "sparse": [{"name": "SVTPrivacy"}],
    "central noise": [{"name": "GaussianDP", "clip": 0.1, "noise_multiplier": 0.01, "at": "server_in"}],
    "held back": [{"name": "ExcludeVars", "names": ["*classifier*"]}],
    "encrypted": [{"name": "HomomorphicCKKS"}],
}  # fmt: skip


def copied(model) -> dict:
    return {name: np.copy(array) for name, array in TorchState(model).get_state().items()}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_trainer_goes_through_every_filter_and_ends_with_the_global_model(federation, chain) -> None:
    pytest.importorskip({"noise": "dp_accounting", "central noise": "dp_accounting"}.get(chain, "numpy"))
    pytest.importorskip("tenseal" if chain == "encrypted" else "numpy")
    run = federation(sites=2, rounds=2, filters=tuple(CHAINS[chain]))
    start = copied(m.adapted(m.classifier()))
    model = m.adapted(m.classifier())
    partner = run.partner(m.adapted(m.classifier()), lambda _round, arrays: arrays)
    m.trainer(FederatedCallback(kit=run.kit()), model=model).train()
    partner.ended()
    final, theirs = copied(model), partner.received[-1]
    assert list(final) == list(theirs)
    assert all(np.array_equal(final[name], theirs[name]) for name in final)
    moved = {name for name in final if not np.array_equal(final[name], start[name])}
    assert moved
    if chain == "held back":
        assert not [name for name in moved if "classifier" in name and "lora" not in name]


def test_a_spent_budget_ends_the_training_with_the_reason(federation) -> None:
    pytest.importorskip("dp_accounting")
    dp = {"name": "GaussianDP", "clip": 0.1, "noise_multiplier": 4.0, "epsilon": 3.0}
    run = federation(sites=2, rounds=2, filters=(dp,), min_sites=1)
    earlier = read_kit(run.kit())  # a process before this one has spent it
    Ledger(Path(earlier.folder)).spend(earlier.job, 2, "GaussianDP", [GaussianDP(epsilon=3).release(4.0)] * 2, [])
    partner = run.partner(m.adapted(m.classifier()))
    with pytest.raises(PrivacyBudgetError, match="the privacy budget of site-1 is spent: round 1"):
        m.trainer(FederatedCallback(kit=run.kit()), model=m.adapted(m.classifier())).train()
    partner.ended()
