"""Parameters that the optimizer trains and that are not registered in the module."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.lightning import FederatedCallback


def module_with_head(pl: Any, held: Any) -> Any:
    """A module and a second network, which `held` puts into what the module's attribute `heads` holds."""
    extra = nn.Linear(2, 2)

    class WithHead(type(m.module(pl))):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            networks = nn.ModuleList([self.net, extra])
            return torch.optim.SGD(networks.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(extra(self.net(x)), y)

    made = WithHead()
    made.heads = held(extra)
    return made, extra


def test_network_in_a_list_travels_as_if_it_were_registered(federation, pl) -> None:
    """PyTorch does not look into lists; an nn.ModuleList is the same to the federation."""

    def trained(held: Any) -> list[np.ndarray]:
        run = federation(sites=2)

        def site(place: Any) -> np.ndarray:
            torch.manual_seed(place.index)
            module, extra = module_with_head(pl, held)
            m.trainer(FederatedCallback(kit=place.kit), pl=pl, max_epochs=100).fit(module, m.loader(place.index))
            return extra.weight.detach().numpy().copy()

        return [*run.run(site).values(), run.model()["heads.0.weight"]]

    wanted = trained(lambda extra: nn.ModuleList([extra]))
    assert all(np.array_equal(found, wanted[0]) for found in trained(lambda extra: [extra]))


def test_network_that_nobody_knows_is_announced(federation) -> None:
    run = federation(sites=1)

    def site(place: Any) -> None:
        module, _ = module_with_head(m.package(), lambda extra: None)
        m.trainer(FederatedCallback(kit=place.kit), max_epochs=100).fit(module, m.loader())

    with pytest.warns(UserWarning, match=r"are not part of the model.* There are 2, by name or shape: \[2, 2\], \[2\]"):
        run.run(site)
