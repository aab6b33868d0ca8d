"""The global model is what is validated, monitored and saved, and a metric belongs to the file beside it."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.lightning import FederatedCallback
from fl_runtime.errors import ConfigError


def loss_of(arrays: Any, loader: Any = None) -> float:
    """Return the loss of these weights on the validation data, computed without Lightning."""
    net = m.network().eval()
    net.load_state_dict({n.removeprefix("net."): torch.as_tensor(np.asarray(a)) for n, a in arrays.items()})
    losses = [(nn.functional.cross_entropy(net(x), y).item(), len(y)) for x, y in loader or m.validation()]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


class Watcher:
    """Notes what other callbacks see of validation and of the trainer's intervals; made for one package."""

    def __new__(cls, pl: Any) -> Any:
        class Seen(pl.Callback):
            def __init__(self) -> None:
                self.validated: list[tuple[int, float]] = []
                self.intervals: list[Any] = []
                self.models: list[Any] = []

            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                if not trainer.sanity_checking:
                    self.validated.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))
                    self.models.append(m.weights(pl_module))

            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                self.intervals.append((trainer.val_check_batch, trainer.check_val_every_n_epoch))

        return Seen()


def two_sites(run: Any, pl: Any, callbacks: Any = lambda: (), *, given: Any = None, **options: Any) -> list[Any]:
    """Train two sites on different rows with the same validation data; return [(trainer, module, watcher)]."""

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        module, watcher = m.module(pl), Watcher(pl)
        callback = FederatedCallback(kit=place.kit, **(given or {}))
        more = [watcher, *callbacks()]
        fields = {"max_epochs": 100, "default_root_dir": place.name, **options}
        trainer = m.trainer(callback, pl=pl, callbacks=more, **fields)
        trainer.fit(module, m.loader(place.index), m.validation())
        return trainer, module, watcher

    return list(run.run(site).values())


def files_of(trainer: Any) -> list[str]:
    return sorted(trainer.checkpoint_callback.best_k_models)


def saved_weights(path: Any) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in torch.load(path, weights_only=True)["state_dict"].items()}


def reports(run: Any, site: str = "site-1") -> list[float]:
    return [e.data["metrics"]["loss"] for e in run.events if e.kind == "report" and e.site == site]


@pytest.mark.parametrize(
    ("every", "options", "at"),
    [
        ("epoch", {}, [3, 6, 9]),
        ("epoch", {"check_val_every_n_epoch": 2}, [3, 6, 9]),
        ("epoch", {"val_check_interval": 2}, [2, 3, 5, 6, 8, 9]),
        ("epoch", {"check_val_every_n_epoch": None, "val_check_interval": 4}, [3, 4, 6, 8, 9]),
        ("epoch", {"num_sanity_val_steps": 0}, [3, 6, 9]),
        ("epoch", {"min_epochs": 20}, [3, 6, 9]),
        (2, {}, [2, 3, 4, 6]),
        (4, {"check_val_every_n_epoch": 3}, [4, 8, 9, 12]),
        ("2 epochs", {"check_val_every_n_epoch": 4}, [6, 12, 18]),
    ],
)
def test_every_global_model_is_validated_once_and_reported(federation, pl, every, options, at) -> None:
    run = federation(sites=2, rounds=3, every=every)
    (trainer, module, watcher), (_, other, other_watcher) = two_sites(run, pl, **options)
    run.result()
    assert [step for step, _ in watcher.validated] == at
    size = trainer.global_step // 3
    after = {step: (score, model) for (step, score), model in zip(watcher.validated, watcher.models, strict=True)}
    told = dict(zip((s for s, _ in other_watcher.validated), other_watcher.models, strict=True))
    for number, score in enumerate(reports(run), 1):
        mine, model = after[number * size]
        assert score == pytest.approx(mine) == pytest.approx(loss_of(model))
        assert m.same(model, told[number * size])  # the global model, the same at both sites
    assert len(reports(run)) == len(reports(run, "site-2")) == 3
    assert m.same(m.weights(module), run.model()) and m.same(m.weights(other), run.model())
    wanted = options.get("check_val_every_n_epoch", 1)
    assert {interval for _, interval in watcher.intervals} == {wanted}  # the user's own are never seen changed
    assert len({batch for batch, _ in watcher.intervals}) == 1


def test_best_round_is_picked_by_these_scores(federation, pl) -> None:
    run = federation(sites=2, rounds=3)
    two_sites(run, pl)
    assert run.result().best_round == 1 + int(np.argmin(reports(run)))
    assert m.same(saved_weights(run.folder / "best" / "model.ckpt"), run.model("best"))


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize("when", [{}, {"save_on_train_epoch_end": False}, {"every_n_train_steps": 2}])
def test_a_saved_metric_is_that_of_the_weights_beside_it(federation, pl, every, when) -> None:
    run = federation(sites=2, rounds=3, every=every)
    checkpoint = pl.callbacks.ModelCheckpoint

    def callbacks() -> Any:
        return [checkpoint(monitor="val_loss", save_top_k=-1, filename="{step}", **when)]

    results = two_sites(run, pl, callbacks, enable_checkpointing=True)
    for trainer, _, _ in results:
        files = trainer.checkpoint_callback.best_k_models
        assert files
        for path, score in files.items():
            if "every_n_train_steps" not in when:  # that saves before validation, with the last score there was
                assert float(score) == pytest.approx(loss_of(saved_weights(path)), rel=1e-5), path
    size = 3 if every == "epoch" else every
    for mine, theirs in zip(*(files_of(trainer) for trainer, _, _ in results), strict=True):
        step = torch.load(mine, weights_only=True)["global_step"]
        same = m.same(saved_weights(mine), saved_weights(theirs))
        assert same == (step % size == 0), f"step {step}"  # at the end of a round, and only there, the global model


def test_early_stopping_sees_global_scores_and_the_site_leaves(federation, pl) -> None:
    run = federation(sites=2, rounds=6, min_sites=1)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        stopping = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0)  # nothing is ever better
        callbacks = [stopping] if place.index == 0 else []
        trainer = m.trainer(FederatedCallback(kit=place.kit), pl=pl, callbacks=callbacks)
        module = m.module(pl)
        trainer.fit(module, m.loader(place.index), m.validation())
        return trainer.global_step, stopping.best_score

    (steps, best), (other_steps, _) = run.run(site).values()
    assert steps == 2 * m.STEPS and other_steps == 6 * m.STEPS
    assert float(best) == pytest.approx(reports(run)[0])
    (left,) = [e for e in run.events if e.kind == "left" and e.site == "site-1"]
    assert "the trainer stopped at step 6" in left.data["reason"]
    assert len(run.result().rounds) == 6


def test_evaluate_global_off_leaves_validation_to_the_user(federation, pl) -> None:
    run = federation(sites=2, rounds=2, every=2)
    (_, _, watcher), _ = two_sites(run, pl, given={"evaluate_global": False})
    assert [step for step, _ in watcher.validated] == [3] and reports(run) == []


def test_evaluate_global_without_validation_data_is_refused(federation) -> None:
    run = federation()
    module = m.module()
    with pytest.raises(ConfigError, match="val_dataloaders"):
        m.trainer(FederatedCallback(kit=run.places[0].kit, evaluate_global=True)).fit(module, m.loader())
    assert module.losses == []


def test_several_validation_sets_make_one_score(federation) -> None:
    run = federation(rounds=1)
    trainer = m.trainer(FederatedCallback(kit=run.places[0].kit))
    sets = [m.validation(8, seed=1), m.validation(24, seed=2)]
    module = m.module()
    trainer.fit(module, m.loader(), sets)
    (report,) = [e for e in run.events if e.kind == "report"]
    each = [loss_of(m.weights(module), loader) for loader in sets]
    assert report.data["metrics"]["loss"] == pytest.approx((each[0] * 8 + each[1] * 24) / 32)
    assert report.data["num_examples"] == 32


@pytest.mark.parametrize("every", ["epoch", 2])
def test_plateau_schedule_follows_global_scores(federation, every) -> None:
    run = federation(rounds=3, every=every)
    module = m.module()
    seen: list[float] = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(float(metrics))
            super().step(metrics)

    def configure() -> Any:
        optimizer = m.optimizer_for(module.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Plateau(optimizer), "monitor": "val_loss"}}

    module.configure_optimizers = configure
    m.trainer(FederatedCallback(kit=run.places[0].kit)).fit(module, m.loader(), m.validation())
    assert seen if every == 2 else seen == pytest.approx(reports(run))


def test_what_model_checkpoint_monitors_picks_the_best_round(federation, pl) -> None:
    run = federation(sites=2, rounds=3)
    savers = lambda: [pl.callbacks.ModelCheckpoint(monitor="val_acc", mode="max")]  # noqa: E731
    two_sites(run, pl, savers, enable_checkpointing=True)
    result = run.result()
    terms = run.server.trainings.newest.run.state.plan.terms
    assert (terms.best_metric, terms.best_mode) == ("acc", "max")
    assert result.best_round == 1 + int(np.argmax([r.metrics["acc"] for r in result.rounds]))
