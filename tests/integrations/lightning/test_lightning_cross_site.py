"""Cross-site evaluation by Lightning's own validation, which leaves no trace in the trainer."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import CrossSiteCase, Trained, cross_site_cases
from fl_runtime.types import Arrays


class Scored(m.Example):
    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        torch.manual_seed(100 + site)
        built = m.module(self.pl)
        fitting = m.trainer(FederatedCallback(**arguments), pl=self.pl, max_epochs=epochs, num_sanity_val_steps=0)
        generator = torch.Generator()  # of its own: else its iterators would draw from that of the dropout
        fitting.fit(built, m.loader(site), DataLoader(m.rows(200 + site, 16), batch_size=8, generator=generator))
        return Trained(m.weights(built), fitting.global_step)

    def score(self, site: int, weights: Arrays) -> dict[str, float]:
        net = m.network().eval()
        net.load_state_dict({name.removeprefix("net."): torch.tensor(array) for name, array in weights.items()})
        x, y = m.rows(200 + site, 16).tensors
        with torch.no_grad():
            scores = net(x)
        right = (scores.argmax(-1) == y).float().mean()
        return {"loss": float(nn.functional.cross_entropy(scores, y)), "acc": float(right)}


@pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
def test_the_callback_conforms(case: CrossSiteCase, pl: Any) -> None:
    case(Scored(pl))


@pytest.mark.parametrize("every", ["epoch", 2])
def test_the_trainer_knows_nothing_of_it(federation, pl, every) -> None:
    def left(cross_site: bool) -> tuple[Any, ...]:
        run = federation(sites=2, rounds=3, every=every, cross_site=cross_site)
        heard: list[int] = []

        class Ears(pl.Callback):
            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                heard.append(trainer.global_step)

        def site(place: Any) -> Any:
            torch.manual_seed(place.index)
            module, folder = m.module(pl), f"{cross_site}/{place.name}"
            best = pl.callbacks.ModelCheckpoint(
                dirpath=f"{folder}/files", monitor="val_loss", save_top_k=-1, filename="{step}"
            )
            logger = pl.loggers.CSVLogger(folder, "log")
            callback, more = FederatedCallback(kit=place.kit), [Ears(), best]
            fields = {"logger": logger, "enable_checkpointing": True, "max_epochs": 100}
            trainer = m.trainer(callback, pl=pl, callbacks=more, **fields)
            live = [p.data_ptr() for p in module.parameters()]
            trainer.fit(module, m.loader(place.index), m.validation(seed=place.index))
            assert [p.data_ptr() for p in module.parameters()] == live
            rows = logger.experiment.metrics
            return (
                {k.rsplit("/")[-1]: float(v) for k, v in best.best_k_models.items()},
                {k: float(v) for k, v in trainer.callback_metrics.items() if "seconds" not in k},
                [{k: v for k, v in row.items() if "seconds" not in k} for row in rows],
                m.weights(module),
                [{k: v.clone() for k, v in s.items()} for s in trainer.optimizers[0].state_dict()["state"].values()],
                (trainer.callbacks[0] is callback, trainer.loggers == [logger]),
            )

        found = run.run(site)
        run.result()
        scores = [e.data["metrics"]["loss"] for e in run.events if e.kind == "cross_score"]
        assert len(scores) == (4 if cross_site else 0)
        return *found["site-1"], heard

    best, metrics, rows, weights, optimizer, same, heard = left(True)
    alone = left(False)
    assert (best, metrics, rows, same, heard) == (*alone[:3], (True, True), alone[-1])
    assert m.same(weights, alone[3])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(optimizer, alone[4], strict=True) for k in a)
