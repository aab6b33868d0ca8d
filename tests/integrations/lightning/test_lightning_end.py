"""What the module, `model/` and `best/` hold when a fit has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_models as m
import pytest
import torch
from safetensors.numpy import load_file

from fl_adapters.lightning import FederatedCallback


def forward_in_training_mode(net: torch.nn.Module) -> None:
    """Change the batch-norm statistics of `net`, as sampling from a network in training mode does."""
    net.train()
    net(torch.full((8, 4), 50.0))


def test_statistics_changed_after_the_last_exchange_are_put_back(federation, pl) -> None:
    """In every hook that follows the last exchange: the module's own, and a callback's behind ours."""
    run = federation(sites=2)

    class Sampler(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            forward_in_training_mode(module.net)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        module = m.module(pl)
        module.on_train_epoch_end = lambda: forward_in_training_mode(module.net)
        module.on_train_end = lambda: forward_in_training_mode(module.net)
        module.on_fit_end = lambda: forward_in_training_mode(module.net)
        trainer = m.trainer(FederatedCallback(kit=place.kit), pl=pl, callbacks=[Sampler()], max_epochs=100)
        trainer.fit(module, m.loader(place.index), m.validation())
        return m.weights(module)

    sites = run.run(site)
    exported, server = load_file(run.folder / "model" / "model.safetensors"), run.model()
    for found in sites.values():
        assert m.same(found, server)
        assert m.same(exported, found)


@pytest.mark.parametrize("scored_by", [0, 1])
def test_best_model_is_written_whichever_site_has_validation_data(federation, scored_by: int) -> None:
    run = federation(sites=2)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        module = m.module()
        data = m.validation() if place.index == scored_by else None
        m.trainer(FederatedCallback(kit=place.kit), max_epochs=100).fit(module, m.loader(place.index), data)
        return m.weights(module)

    sites = run.run(site)
    saved = torch.load(run.folder / "best" / "model.ckpt", weights_only=True)["state_dict"]
    final = Path(run.folder, "model", "model.safetensors")
    assert m.same({name: tensor.numpy() for name, tensor in saved.items()}, run.model("best"))
    assert all(m.same(load_file(final), weights) for weights in sites.values())


def test_checkpoints_that_sites_save_by_the_same_name_do_not_meet(federation, pl) -> None:
    """And the script finds its own again by that name."""
    run = federation(sites=2, rounds=1)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        module = m.module(pl)
        trainer = m.trainer(FederatedCallback(kit=place.kit, keep_local=["net.1.*"]), pl=pl, max_epochs=100)
        trainer.fit(module, m.loader(place.index), m.validation())
        trainer.save_checkpoint("final.ckpt")
        scores = trainer.validate(module, m.validation(), ckpt_path="final.ckpt", verbose=False)
        return m.weights(module), scores

    for name, (weights, scores) in run.run(site).items():
        saved = torch.load(run.folder / "sites" / name / "final.ckpt", weights_only=True)["state_dict"]
        assert m.same({n: tensor.numpy() for n, tensor in saved.items()}, weights)
        assert scores
    assert not Path("final.ckpt").exists()
