"""What the network, `model/` and `best/` hold when a run has ended."""

from __future__ import annotations

from typing import Any

import monai_models as m
import pytest
import torch
from ignite.engine import Events
from safetensors.numpy import load_file

from fl_adapters.monai import FederatedHandler


class Sampler:
    """Puts rows through the network in training mode when epochs and the run have ended: new statistics."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.network.train()
        self.network(torch.full((8, 4), 50.0))


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_statistics_changed_after_the_last_exchange_are_put_back(federation, first: bool) -> None:
    run = federation(sites=2)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net = m.network()
        ours, sampler = FederatedHandler(kit=place.kit), Sampler(net)
        m.trainer(net, [ours, sampler] if first else [sampler, ours], data=m.loader(place.index), epochs=100).run()
        return m.weights(net)

    sites = run.run(site)
    exported, server = load_file(run.folder / "model" / "model.safetensors"), run.model()
    for found in sites.values():
        assert m.same(found, server)
        assert m.same(exported, found)


def test_best_model_is_written_by_a_site_without_validation_data(federation) -> None:
    run = federation(sites=2)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net = m.network()
        handlers = [m.validates(net)] if place.index else []
        m.trainer(net, [*handlers, FederatedHandler(kit=place.kit)], data=m.loader(place.index), epochs=100).run()
        return m.weights(net)

    run.run(site)
    saved = torch.load(run.folder / "best" / "model.pt", weights_only=True)
    assert m.same({name: tensor.numpy() for name, tensor in saved.items()}, run.model("best"))
