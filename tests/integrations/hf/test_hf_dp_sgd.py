"""DP-SGD beneath an HF Trainer: the script adds one argument, the ledger counts records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models as m
import numpy as np
import pytest
import torch

from fl_adapters import DPSGD, ConfigError
from fl_adapters.hf import FederatedCallback
from fl_adapters.participant.kit import read_kit
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.filters.ledger import Ledger, epsilon

pytest.importorskip("opacus", reason="DP-SGD needs opacus: pip install fl-adapters[dp]")


def trained(dp_sgd: DPSGD | None, model: Any = None, **arguments: Any) -> tuple[Any, LocalFederation]:
    """Return the model after two rounds of one site, and its federation."""
    federation = LocalFederation(sites=1, rounds=2, states=[(torch.get_rng_state, torch.set_rng_state)])
    model = model or m.adapted(m.classifier())
    options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, **arguments}

    def site(place: Place) -> None:
        m.trainer(FederatedCallback(kit=place.kit, dp_sgd=dp_sgd), model=model, **options).train()

    with federation:
        federation.run(site)
        entries = Ledger(Path(read_kit(federation.places[0].kit).folder)).entries()
        rounds = federation.server.result().rounds
    return entries, (federation, model, rounds)


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


def test_without_noise_and_with_a_wide_clip_the_trainer_learns_as_without() -> None:
    start = weights(m.adapted(m.classifier()))
    found = [weights(trained(dp_sgd)[1][1]) for dp_sgd in (None, DPSGD(max_grad_norm=1e6, noise_multiplier=1e-12))]
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-3, atol=1e-5)
    assert any(np.abs(found[0][name] - start[name]).max() > 1e-3 for name in start), "it learned something"


def test_the_budget_is_used_up_by_the_last_round_and_shown_in_the_history() -> None:
    entries, (_, model, rounds) = trained(DPSGD(epsilon=8, max_grad_norm=1.0))
    assert [(e.round, e.filter, e.mechanism.unit, e.mechanism.count) for e in entries] == [
        (1, "DPSGD", "record", 1),
        (2, "DPSGD", "record", 1),
    ]
    assert epsilon([e.mechanism for e in entries], 1e-5) == pytest.approx(8, rel=1e-3)
    assert [r.metrics["dp_sgd_epsilon"] for r in rounds][-1] == pytest.approx(8, rel=1e-3)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters()), "the model is as it was"


def test_accumulated_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match="a step after every batch"):
        trained(DPSGD(epsilon=8), gradient_accumulation_steps=2)
