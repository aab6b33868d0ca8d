"""The global model is what is validated, monitored and saved, and a metric belongs to the file beside it."""

from __future__ import annotations

from typing import Any

import monai_models as m
import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from ignite.metrics import Loss
from monai.engines import SupervisedEvaluator
from monai.engines.utils import default_metric_cmp_fn
from monai.handlers import CheckpointSaver, EarlyStopHandler, LrScheduleHandler, MeanDice, ValidationHandler
from monai.networks.nets import UNet
from torch.nn.functional import cross_entropy

from fl_adapters.monai import FederatedHandler
from fl_adapters.monai.scores import key_metric, scores_of
from fl_adapters.participant.options import BestMetric
from fl_runtime.errors import ConfigError


class Watcher:
    """Notes the scores and weights of each run of an evaluator."""

    def __init__(self) -> None:
        self.validated: list[tuple[int, float]] = []
        self.models: list[Any] = []
        self.trainer: Any = None

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.validated.append((self.trainer.state.iteration, engine.state.metrics["val_loss"]))
        self.models.append(m.weights(engine.network))


def two_sites(run: Any, first: bool = False, more: Any = lambda net: (), *, given: Any = None, **valid: Any) -> Any:
    """Train two sites on different rows with the same validation data; return [(trainer, watcher)].

    Args:
        first: Whether our handler comes before the others.
        more: Called as more(net) for further handlers of the evaluator.
    """

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net, watcher = m.network(), Watcher()
        ours = FederatedHandler(kit=place.kit, **(given or {}))
        validation = m.validates(net, handlers=[watcher, *more(net)], **valid)
        handlers = [ours, validation] if first else [validation, ours]
        watcher.trainer = m.trainer(net, handlers, data=m.loader(place.index), epochs=100)
        watcher.trainer.run()
        return watcher.trainer, watcher

    return list(run.run(site).values())


def reports(run: Any, site: str = "site-1") -> list[float]:
    run.server.wait(60)  # until its events have been delivered
    return [e.data["metrics"]["loss"] for e in run.events if e.kind == "report" and e.site == site]


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(
    ("every", "options", "at"),
    [
        ("epoch", {}, [3, 6, 9]),
        ("epoch", {"interval": 2}, [3, 6, 9]),
        ("epoch", {"interval": 2, "epoch_level": False}, [2, 3, 4, 6, 6, 8, 9]),  # at 6 the site's own weights first
        ("2 epochs", {"interval": 4}, [6, 12, 18]),
        (2, {}, [2, 3, 4, 6]),
        (4, {"interval": 3}, [4, 8, 9, 12]),
        (3, {"interval": 3, "epoch_level": False}, [3, 6, 9]),
    ],
)
def test_every_global_model_is_validated_once_and_reported(federation, every, options, at, first) -> None:
    run = federation(sites=2, rounds=3, every=every)
    (training, watcher), (other, other_watcher) = two_sites(run, first, **options)
    run.result()
    assert [step for step, _ in watcher.validated] == at
    size = training.state.iteration // 3
    after = {step: (score, model) for (step, score), model in zip(watcher.validated, watcher.models, strict=True)}
    told = dict(zip((s for s, _ in other_watcher.validated), other_watcher.models, strict=True))
    for number, score in enumerate(reports(run), 1):
        mine, model = after[number * size]
        assert score == pytest.approx(mine) == pytest.approx(m.loss_of(model))
        assert m.same(model, told[number * size])  # the global model, the same at both sites
    assert len(reports(run)) == len(reports(run, "site-2")) == 3
    assert m.same(m.weights(training.network), run.model()) and m.same(m.weights(other.network), run.model())


def test_best_round_is_picked_by_these_scores(federation) -> None:
    run = federation(sites=2, rounds=3)
    two_sites(run)
    assert run.result().best_round == 1 + int(np.argmin(reports(run)))
    best = torch.load(run.folder / "best" / "model.pt", weights_only=True)
    assert m.same({name: t.numpy() for name, t in best.items()}, run.model("best"))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("every", ["epoch", 2])
def test_a_saved_metric_is_that_of_the_weights_beside_it(federation, every, first) -> None:
    run = federation(sites=2, rounds=3, every=every)

    def saver(net: Any) -> Any:
        options = {"key_metric_negative_sign": True, "key_metric_n_saved": 9}
        return [CheckpointSaver("best", {"net": net}, save_key_metric=True, **options)]

    results = two_sites(run, first, saver)
    files = sorted((run.folder / "sites" / "site-1" / "best").glob("*.pt"))
    assert files
    for file in files:
        score = -float(file.stem.rpartition("=")[2])
        saved = torch.load(file, weights_only=True)
        assert score == pytest.approx(m.loss_of(saved), abs=1e-4), file.name
    lowest = min(loss for _, loss in results[0][1].validated)
    assert any(float(file.stem.rpartition("=")[2]) == pytest.approx(-lowest, abs=1e-4) for file in files)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("epoch_level", [True, False])
def test_what_the_trainer_saves_at_the_end_of_a_round_is_the_global_model(federation, epoch_level, first) -> None:
    run = federation(sites=2, rounds=2, every="epoch" if epoch_level else 2)

    def site(place: Any) -> None:
        torch.manual_seed(place.index)
        net = m.network()
        options = {"save_interval": 1 if epoch_level else 2, "epoch_level": epoch_level, "save_final": True}
        saver = CheckpointSaver("kept", {"net": net}, **options)
        ours = FederatedHandler(kit=place.kit)
        m.trainer(net, [ours, saver] if first else [saver, ours], data=m.loader(place.index)).run()

    run.run(site)
    mine, theirs = (sorted((run.folder / "sites" / s / "kept").glob("*.pt")) for s in ("site-1", "site-2"))
    assert len(mine) == len(theirs) == 3
    for a, b in zip(mine, theirs, strict=True):
        one, other = (torch.load(file, weights_only=True) for file in (a, b))
        assert m.same(one, other), a.name
    final = next(file for file in mine if "final" in file.name)
    assert m.same(torch.load(final, weights_only=True), run.model())


def test_early_stopping_sees_global_scores_and_the_site_leaves(federation) -> None:
    run = federation(sites=2, rounds=6, min_sites=1)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net = m.network()
        validation = m.validates(net)
        training = m.trainer(net, [validation, FederatedHandler(kit=place.kit)], data=m.loader(place.index))
        if place.index == 0:  # nothing is ever better
            stopping = EarlyStopHandler(1, lambda e: -e.state.metrics["val_loss"], training, min_delta=10.0)
            stopping.attach(validation.validator)
        training.run()
        return training.state.iteration

    mine, other = run.run(site).values()
    assert mine == 2 * m.STEPS and other == 6 * m.STEPS
    (left,) = [e for e in run.events if e.kind == "left" and e.site == "site-1"]
    assert "the trainer stopped at iteration 6, in round 3" in left.data["reason"]
    assert len(run.result().rounds) == 6


def test_evaluate_global_off_leaves_validation_to_the_user(federation) -> None:
    run = federation(sites=2, rounds=2, every=2)
    (_, watcher), _ = two_sites(run, given={"evaluate_global": False})
    assert [step for step, _ in watcher.validated] == [3] and reports(run) == []


def test_evaluate_global_without_validation_is_refused(federation) -> None:
    seen = m.Losses()
    handlers = [seen, FederatedHandler(kit=federation().places[0].kit, evaluate_global=True)]
    with pytest.raises(ConfigError, match="there is no ValidationHandler"):
        m.trainer(m.network(), handlers).run()
    assert seen.losses == []


def averaging(kit: str, **given: Any) -> Any:
    """Return a trainer whose evaluator scores the exponential moving average of the network, and the EMA handler."""
    net = m.network()
    ema = EMAHandler(net, momentum=0.5)
    validation = ValidationHandler(1, m.evaluator(ema.ema_model))
    training = m.trainer(net, [validation, FederatedHandler(kit=kit, **given)])
    ema.attach(training)
    return training, ema


def test_average_of_the_network_is_neither_exchanged_nor_taken_for_the_global_model(federation) -> None:
    run = federation(rounds=3)
    torch.manual_seed(0)
    training, ema = averaging(run.places[0].kit)
    with pytest.warns(UserWarning, match="has another network"):
        training.run()
    torch.manual_seed(0)
    plain = m.network()
    expected = EMAHandler(plain, momentum=0.5)
    alone = m.trainer(plain, [ValidationHandler(1, m.evaluator(expected.ema_model))], epochs=3)
    expected.attach(alone)
    alone.run()
    parameters = dict(expected.ema_model.named_parameters())
    for name, value in ema.ema_model.named_parameters():  # as it would be without us
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=1e-6)
    assert reports(run) == [] and m.same(m.weights(training.network), run.model())
    assert not torch.equal(ema.ema_model[0].weight, training.network[0].weight)


def test_evaluate_global_with_an_evaluator_of_the_average_is_refused(federation) -> None:
    training, _ = averaging(federation().places[0].kit, evaluate_global=True)
    with pytest.raises(ConfigError, match="has another network"):
        training.run()
    assert training.state.iteration == 0


@pytest.mark.parametrize("every", ["epoch", 2])
def test_plateau_schedule_follows_global_scores(federation, every) -> None:
    run = federation(rounds=3, every=every)
    net, seen = m.network(), []
    optimizer, validation = m.optimizer_for(net), m.validates(net)

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(float(metrics))
            super().step(metrics)

    metric = lambda engine: validation.validator.state.metrics["val_loss"]  # noqa: E731
    schedule = LrScheduleHandler(Plateau(optimizer), print_lr=False, step_transform=metric)
    ours = FederatedHandler(kit=run.places[0].kit)
    m.trainer(net, [validation, schedule, ours], optimizer=optimizer).run()
    assert seen if every == 2 else seen == pytest.approx(reports(run))


# --- metrics with a value per class -------------------------------------------------------------------------------


def volumes(background: bool, reduction: str, labels: Any = False) -> Any:
    """Run an evaluator with Dice over three classes of 8^3 volumes; its network marks every voxel as class 1."""
    net = UNet(3, 1, 3, (4, 8), (2,))
    label = torch.zeros(2, 1, 8, 8, 8)
    label[0, :, :4], label[1, :, :2], label[1, :, 6:] = 1, 1, 2

    def onehot(engine: Any, batch: Any) -> Any:
        pred = torch.zeros(2, 3, 8, 8, 8)
        pred[:, 1] = 1
        truth = torch.nn.functional.one_hot(batch["label"][:, 0].long(), 3).permute(0, 4, 1, 2, 3)
        engine.state.output = {"pred": pred, "label": truth.float()}
        engine.fire_event(next(e for e in engine._allowed_events if e.name == "MODEL_COMPLETED"))
        return engine.state.output

    extra = {"return_with_label": labels} if labels else {}
    dice = MeanDice(
        include_background=background,
        reduction=reduction,
        output_transform=lambda out: ([o["pred"] for o in out], [o["label"] for o in out]),
        **extra,
    )
    data = [{"image": torch.zeros(2, 1, 8, 8, 8), "label": label}]
    evaluator = SupervisedEvaluator(
        "cpu", data, net, epoch_length=1, key_val_metric={"val_mean_dice": dice}, iteration_update=onehot
    )
    evaluator.run()
    return evaluator


DICE = {1: (2 / 3 + 2 * 0.25 / 1.25) / 2, 2: 0.0}  # of image 1, and over both; class 2 is in the second alone


@pytest.mark.parametrize(
    ("background", "reduction", "labels", "names"),
    [
        (False, "mean", False, {"mean_dice", "mean_dice_1", "mean_dice_2"}),
        (True, "mean", False, {"mean_dice", "mean_dice_0", "mean_dice_1", "mean_dice_2"}),
        (False, "mean_batch", False, {"mean_dice_1", "mean_dice_2"}),
    ],
)
def test_dice_per_class(background, reduction, labels, names) -> None:
    scores = scores_of(volumes(background, reduction, labels))
    assert set(scores) == names
    assert scores["mean_dice_1"] == pytest.approx(DICE[1], abs=1e-4)
    assert scores["mean_dice_2"] == pytest.approx(DICE[2], abs=1e-4)


def test_metrics_of_every_kind() -> None:
    evaluator = m.evaluator(m.network())
    evaluator.state.metrics = {
        "val_loss": 0.5,
        "validation/accuracy": torch.tensor([0.25]),
        "val_dice": {"liver": 0.5, "spleen": torch.tensor(0.25)},
        "liver": 0.5,
        "spleen": torch.tensor(0.25),
        "per_channel": np.array([1.0, 2.0]),
        "matrix": torch.ones(2, 2),
        "text": "no number",
        "ragged": [[1], [2, 3]],
    }
    assert scores_of(evaluator) == {
        "loss": 0.5,
        "accuracy": 0.25,
        "dice_liver": 0.5,
        "dice_spleen": 0.25,
        "per_channel_0": 1.0,
        "per_channel_1": 2.0,
    }


def test_scores_are_weighted_by_the_validation_set(federation) -> None:
    run = federation(rounds=1)
    net = m.network()
    validation = ValidationHandler(1, m.evaluator(net, m.validation(12)))
    m.trainer(net, [validation, FederatedHandler(kit=run.places[0].kit)]).run()
    (report,) = [e for e in run.events if e.kind == "report"]
    assert report.data["num_examples"] == 12
    assert report.data["metrics"]["loss"] == pytest.approx(m.loss_of(m.weights(net), m.validation(12)))


def test_the_key_metric_picks_the_best_round(federation) -> None:
    run = federation(sites=2, rounds=2)

    def site(place: Any) -> None:
        net = m.network()
        gain = Loss(lambda given, label: -cross_entropy(given, label), lambda out: (out["pred"], out["label"]))
        evaluator = SupervisedEvaluator(
            device="cpu",
            val_data_loader=m.validation(),
            network=net,
            key_val_metric={"val_mean_dice": gain},
            decollate=False,
        )
        validation = ValidationHandler(1, evaluator)
        handlers = [validation, FederatedHandler(kit=place.kit)]
        m.trainer(net, handlers, data=m.loader(place.index), epochs=100).run()

    run.run(site)
    result = run.result()
    terms = run.server.trainings.newest.run.state.plan.terms
    assert (terms.best_metric, terms.best_mode) == ("mean_dice", "max")
    assert result.best_round == 1 + int(np.argmax([r.metrics["mean_dice"] for r in result.rounds]))


@pytest.mark.parametrize(
    ("name", "better", "proposed"),
    [
        ("val_mean_dice", default_metric_cmp_fn, BestMetric("mean_dice", "max")),
        ("val_distance", lambda new, best: new < best, BestMetric("distance", "min")),
        ("val_loss", default_metric_cmp_fn, None),
        ("val_mean_dice", lambda new, best: new["all"] > best["all"], None),
        ("val_mean_dice", lambda new, best: False, None),
        (None, default_metric_cmp_fn, None),
    ],
)
def test_a_key_metric_is_proposed_only_if_its_direction_is_known(name, better, proposed) -> None:
    evaluator = m.evaluator(m.network())
    evaluator.state.key_metric_name, evaluator.metric_cmp_fn = name, better
    assert key_metric(evaluator) == proposed
