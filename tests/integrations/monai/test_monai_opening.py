"""`load()`: the network of a run."""

from __future__ import annotations

from typing import Any

import monai_models as m
import torch

from fl_adapters.monai import FederatedHandler


def test_a_network_opens_as_its_state_and_in_an_instance(federation) -> None:
    run = federation(sites=1)

    def site(place: Any) -> Any:
        net = m.network()
        m.trainer(net, [FederatedHandler(kit=place.kit)], data=m.loader(0), epochs=100).run()
        return net.eval()

    [net] = run.run(site).values()
    assert m.same(run.load(), net.state_dict())
    m.network().load_state_dict(run.load())
    rows = torch.randn(4, 4)
    assert torch.equal(run.load(into=m.network()).eval()(rows), net(rows))
