"""`load()`: the module of a run, opened by its class or loaded into an instance."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
import torch

from fl_adapters.lightning import FederatedCallback
from fl_runtime.errors import ConfigError, StateMismatchError


def test_a_module_opens_by_its_class_and_in_an_instance(federation) -> None:
    run = federation(sites=2)
    kept: list[Any] = []

    def site(place: Any) -> None:
        torch.manual_seed(place.index)
        module = m.module()
        m.trainer(FederatedCallback(kit=place.kit), max_epochs=100).fit(module, m.loader(place.index), m.validation())
        kept.append(module.eval())

    run.run(site)
    rows = torch.randn(4, 4)
    for opened in (run.load(type(kept[0])), run.load(into=m.module())):
        assert torch.equal(opened.eval()(rows), kept[0](rows))
    best = torch.load(run.folder / "best" / "model.ckpt", weights_only=True)["state_dict"]
    assert m.same(run.load(type(kept[0]), which="best").state_dict(), best)
    with pytest.raises(ConfigError, match=r"load\(YourModule\)"):
        run.load()
    with pytest.raises(StateMismatchError, match="does not fit"):
        run.load(m.module(width=9))
    checkpoint = run.folder / "model" / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"made": m.same}}, checkpoint)  # names a function to import
    with pytest.raises(ConfigError, match="more than weights"):
        run.load(type(kept[0]))
    checkpoint.unlink()  # as after `job download`
    with pytest.raises(ConfigError, match=r"load\(into=Classifier\(\.\.\.\)\)"):
        run.load(type(kept[0]))
    assert torch.equal(run.load(m.module()).eval()(rows), kept[0](rows))
