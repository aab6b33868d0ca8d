"""Features of Lightning's trainer: optimizers, log, folders and sanity checks; and what is refused."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning_models as m
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from fl_adapters.lightning import FederatedCallback
from fl_adapters.lightning.trainer import refuse_unsupported
from fl_runtime.errors import ConfigError, FederationError


def fit(run: Any, *, pl: Any = None, module: Any = None, validation: Any = None, **options: Any) -> Any:
    """Fit as the run's first site in the test's own thread; return the trainer and the module."""
    module = m.module(pl) if module is None else module
    trainer = m.trainer(FederatedCallback(kit=run.places[0].kit), pl=pl, **options)
    trainer.fit(module, m.loader(), validation)
    return trainer, module


def halves(run: Any, make: Any, **options: Any) -> list[Any]:
    """Train two sites with modules from make() on different rows; return their modules."""

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        module = make()
        trainer = m.trainer(FederatedCallback(kit=place.kit), **options)
        trainer.fit(module, m.loader(place.index))
        return module

    return list(run.run(site).values())


# --- optimizers and precision ------------------------------------------------------------------------------------


def two_optimizers(shared: bool = False) -> Any:
    """Return a module that steps by itself, with a different kind of optimizer for each of its halves."""

    class TwoHalves(m.package().LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy(self.head(torch.relu(self.body(x))), y)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            head = self.parameters() if shared else self.head.parameters()
            return [torch.optim.AdamW(self.body.parameters()), torch.optim.SGD(head, lr=0.1, momentum=0.9)]

    return TwoHalves()


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
def test_several_optimizers_with_manual_optimization(federation, policy) -> None:
    run = federation(sites=2, rounds=3, every="epoch", optimizer_state=policy)
    first, second = halves(run, two_optimizers)
    assert m.same(m.weights(first), run.model()) and m.same(m.weights(second), run.model())
    assert {e.data["local_steps"] for e in run.events if e.kind == "update"} == {2 * m.STEPS}  # as global_step counts
    moments = [o.state[p] for o, p in zip(first.optimizers(), (first.body.weight, first.head.weight), strict=True)]
    others = [o.state[p] for o, p in zip(second.optimizers(), (second.body.weight, second.head.weight), strict=True)]
    assert set(moments[0]) == {"step", "exp_avg", "exp_avg_sq"} and set(moments[1]) == {"momentum_buffer"}
    assert float(moments[0]["step"]) == (m.STEPS if policy == "reset" else 3 * m.STEPS)
    assert not torch.equal(moments[1]["momentum_buffer"], others[1]["momentum_buffer"])  # after a round of their own


@pytest.mark.parametrize(("every", "ends"), [(4, [4, 8, 12]), (3, [4, 6, 10])])
def test_rounds_of_steps_do_not_drift_where_a_batch_makes_two(federation, every, ends) -> None:
    run = federation(rounds=3, every=every)
    fit(run, module=two_optimizers())
    local = [e.data["local_steps"] for e in run.events if e.kind == "update"]
    assert np.cumsum(local).tolist() == ends


def test_one_parameter_in_two_optimizers_cannot_be_averaged(federation) -> None:
    run = federation(optimizer_state="average")
    with pytest.raises(ConfigError, match="two optimizers train this parameter"):
        fit(run, module=two_optimizers(shared=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(federation, precision) -> None:
    run = federation(sites=2, rounds=2)
    modules = halves(run, m.module, precision=precision)
    dtype = {"bf16-mixed": "float32", "bf16-true": "bfloat16", "64-true": "float64"}[precision]
    assert run.model()["net.0.weight"].dtype.name == dtype
    assert torch.equal(modules[0].net[0].weight, modules[1].net[0].weight)


def test_average_of_factored_moments_is_refused_before_the_first_step(federation) -> None:
    run = federation(optimizer_state="average")
    module = m.module()
    module.configure_optimizers = lambda: torch.optim.Adafactor(module.parameters())
    with pytest.raises(ConfigError, match="rows and columns"):
        fit(run, module=module)
    assert module.losses == []


def test_parameters_keep_their_identity(federation) -> None:
    run = federation(sites=2, rounds=2)
    made: dict[int, dict[str, Any]] = {}  # by the id of the module

    def parameters(module: Any) -> dict[str, Any]:
        return {name: (id(t), t.device) for name, t in module.state_dict(keep_vars=True).items()}

    def make() -> Any:
        module = m.module()
        made[id(module)] = parameters(module)
        return module

    for module in halves(run, make):
        assert parameters(module) == made[id(module)]


# --- its log and its folders -------------------------------------------------------------------------------------


def test_rounds_are_in_the_frameworks_own_log(federation, pl) -> None:
    run = federation(rounds=3)
    logger = pl.loggers.CSVLogger("logs")
    trainer, _ = fit(run, pl=pl, logger=logger, log_every_n_steps=1000)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["federation_round"]]
    assert [(float(row["federation_round"]), int(row["step"])) for row in rows] == [(1, 3), (2, 6), (3, 9)]
    size = sum(array.nbytes for array in run.model().values())
    assert all(float(row["federation_bytes_up"]) >= size <= float(row["federation_bytes_down"]) for row in rows)
    assert all(float(row["federation_seconds"]) > 0 for row in rows)
    assert trainer.callback_metrics["federation_round"] == 3


def test_output_folders_of_a_simulated_site_are_its_own(federation, pl, tmp_path) -> None:
    run = federation(rounds=1)
    own = run.folder / "sites" / "site-1"
    checkpoint = pl.callbacks.ModelCheckpoint(dirpath="checkpoints", save_last=True)
    loggers = [pl.loggers.CSVLogger("logs"), pl.loggers.TensorBoardLogger("board")]
    trainer, _ = fit(run, pl=pl, logger=loggers, callbacks=[checkpoint], enable_checkpointing=True)
    assert Path(checkpoint.last_model_path).is_relative_to(own / "checkpoints")
    assert Path(trainer.default_root_dir) == own
    assert list((own / "logs").rglob("metrics.csv")) and list((own / "board").rglob("events.*"))
    left = {path.name for path in tmp_path.iterdir()} - {run.folder.name}
    assert left == set()  # nothing was made in the working directory before it moved


def test_default_logger_and_checkpoints_move_too(federation, pl, tmp_path) -> None:
    run = federation(rounds=1)
    trainer, _ = fit(run, pl=pl, logger=True, enable_checkpointing=True)
    assert Path(trainer.checkpoint_callback.best_model_path).is_relative_to(run.folder / "sites" / "site-1")
    assert {path.name for path in tmp_path.iterdir()} == {run.folder.name}


def test_absolute_folder_of_two_sites_is_refused(federation, tmp_path_factory) -> None:
    run = federation(sites=2, rounds=1)
    folder = str(tmp_path_factory.mktemp("elsewhere"))

    def site(place: Any) -> None:
        checkpoint = m.package().callbacks.ModelCheckpoint(dirpath=folder)
        m.trainer(FederatedCallback(kit=place.kit), callbacks=[checkpoint], enable_checkpointing=True).fit(
            m.module(), m.loader()
        )

    outcomes = run.outcomes({place.name: site for place in run.places}, check=False)
    errors = [outcome.error for outcome in outcomes.values() if isinstance(outcome.error, ConfigError)]
    assert len(errors) == 1 and folder in str(errors[0]) and "relative path" in str(errors[0])


# --- what is left of a run ---------------------------------------------------------------------------------------


def test_results_open_with_lightning(federation, pl) -> None:
    run = federation(rounds=2)
    _, module = fit(run, pl=pl, module=m.module(pl, width=5), validation=m.validation())
    opened = type(module).load_from_checkpoint(run.folder / "model" / "model.ckpt", weights_only=True)
    assert opened.hparams.width == 5 and m.same(m.weights(opened), m.weights(module))
    fresh = m.module(pl, width=5)
    load_model(fresh, run.folder / "model" / "model.safetensors")
    assert m.same(m.weights(fresh), m.weights(module))
    assert m.same(load_file(run.folder / "best" / "model.safetensors"), run.model("best"))
    trained = m.trainer(pl=pl).validate(module, m.validation(), verbose=False)
    assert np.isfinite(trained[0]["val_loss"])


def test_test_and_validate_after_the_run_stay_out_of_the_federation(federation) -> None:
    run = federation(rounds=1)
    trainer, module = fit(run, validation=m.validation())
    run.result()
    trainer.validate(module, m.validation(), verbose=False)
    assert [e.kind for e in run.events].count("joined") == [e.kind for e in run.events].count("report") == 1


def test_keep_local_and_frozen_parts_stay(federation) -> None:
    run = federation(sites=2, rounds=2, keep_local=["net.1.*"])

    def make() -> Any:
        net = m.network()
        with torch.no_grad():
            net[4].weight.fill_(0.5)
        net[4].weight.requires_grad_(False)
        return m.module(net=net)

    first, second = halves(run, make)
    assert set(run.model()) == {"net.0.weight", "net.4.bias"}
    assert not torch.equal(first.net[1].running_mean, second.net[1].running_mean)


def test_site_that_comes_back_after_the_last_round_ends_with_the_final_weights(federation) -> None:
    run = federation(rounds=2)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(run, callbacks=[interrupting(6)], validation=m.validation())  # it has the final weights already
    trainer, module = fit(run, validation=m.validation(), min_epochs=5)
    assert trainer.global_step == 0 and m.same(m.weights(module), run.model())
    assert len(run.result().rounds) == 2
    assert [e.round for e in run.events if e.kind == "report"] == [1, 2]


def interrupting(step: int) -> Any:
    """Return a callback that presses Ctrl-C after this step."""

    class Interrupt(m.package().Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                raise KeyboardInterrupt

    return Interrupt()


# --- copies ------------------------------------------------------------------------------------------------------


def pickled(callback: Any) -> Any:
    return pickle.loads(pickle.dumps(callback))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copy_takes_the_place_of_the_callback(federation, duplicate) -> None:
    run = federation(rounds=2)
    trainer = m.trainer(duplicate(FederatedCallback(kit=run.places[0].kit)))
    trainer.fit(m.module(), m.loader())
    assert len(run.result().rounds) == 2 and len([e for e in run.events if e.kind == "joined"]) == 1


def test_copy_made_in_the_middle_of_a_run_leaves_the_module_alone(federation, pl) -> None:
    run = federation(rounds=1)
    callback, sizes = FederatedCallback(kit=run.places[0].kit), []

    class Copier(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            sizes.append(len(pickle.dumps(callback)))
            copy.deepcopy(callback)

    m.trainer(callback, pl=pl, callbacks=[Copier()]).fit(m.module(pl), m.loader())
    assert max(sizes) < 2000 and len(run.result().rounds) == 1


def test_interrupted_cell_run_again_joins_again(federation) -> None:
    run = federation(rounds=3)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(run, callbacks=[interrupting(5)])
    with pytest.warns(UserWarning, match="behind round 2"):
        trainer, module = fit(run)
    assert len(run.result().rounds) == 3 and trainer.global_step == 2 * m.STEPS
    assert [e.data["attempt"] for e in run.events if e.kind == "joined"] == [1, 2]
    assert module.rates == pytest.approx([m.RATE * (1 - i / 9) for i in range(3, 9)])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_callback_given_twice(federation, pl) -> None:
    run = federation()
    callbacks = [FederatedCallback(kit=run.places[0].kit) for _ in range(2)]
    module = m.module(pl)
    trainer = m.trainer(pl=pl, callbacks=callbacks)
    with pytest.raises(ConfigError, match="twice"):
        trainer.fit(module, m.loader())
    assert module.losses == []


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_split_the_model(pl, name) -> None:
    strategy = type("Own", (getattr(pl.strategies, name),), {"__init__": lambda self: None})()
    trainer = SimpleNamespace(callbacks=[], strategy=strategy, global_step=0)
    with pytest.raises(ConfigError, match="cannot be federated") as error:
        refuse_unsupported(trainer, FederatedCallback)
    assert "use ModelParallelStrategy" in str(error.value)


def test_weight_averaging_callbacks(federation, pl) -> None:
    callbacks = [pl.callbacks.StochasticWeightAveraging(1e-2)]
    if hasattr(pl.callbacks, "WeightAveraging"):
        callbacks.append(pl.callbacks.WeightAveraging())
    for callback in callbacks:
        with pytest.raises(ConfigError, match="in place of the global weights"):
            fit(federation(), pl=pl, callbacks=[callback])


def test_used_trainer_is_refused(federation) -> None:
    trainer = m.trainer(FederatedCallback(kit=federation().places[0].kit))
    trainer.fit(m.module(), m.loader())
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.fit(m.module(), m.loader())


def test_lazy_parameters_are_refused_unless_something_gave_them_a_shape(federation) -> None:
    def lazy(pl: Any = None) -> Any:
        module = m.module(net=nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)))
        module.configure_optimizers = lambda: m.optimizer_for(module.parameters())
        return module

    module = lazy()
    with pytest.raises(ConfigError, match=r"net\.0\.weight"):
        fit(federation(), module=module)
    assert module.losses == []
    run = federation(rounds=1)
    fit(run, module=lazy(), validation=m.validation())  # Lightning's sanity check runs a batch before
    assert run.model()["net.0.weight"].shape == (8, 4)
    run, module = federation(rounds=1), lazy()
    module.configure_model = lambda: module.net(torch.zeros(2, 4))
    fit(run, module=module)
    assert run.model()["net.0.weight"].shape == (8, 4)


def test_weights_that_are_not_finite_are_refused_and_named(federation) -> None:
    module = m.module()
    module.on_train_batch_start = lambda batch, batch_idx: module.net[4].bias.data.fill_(float("nan")) is None
    with pytest.raises(FederationError, match=r"net\.[0-4]\.(weight|bias|running)"):
        fit(federation(rounds=1), module=module)


def test_outside_a_federation_it_stays_out_of_the_way(pl, monkeypatch, capfd, tmp_path) -> None:
    monkeypatch.setattr("fl_adapters.participant.registry._announced_alone", False)
    trained = []
    for callback in (None, FederatedCallback()):
        torch.manual_seed(0)
        module = m.module(pl)
        trainer = m.trainer(callback, pl=pl, max_epochs=2, logger=pl.loggers.CSVLogger("logs"))
        trainer.fit(module, m.loader(), m.validation())
        trained.append(m.weights(module))
        assert "federation_round" not in trainer.callback_metrics
    assert m.same(*trained) and (tmp_path / "logs").is_dir()
    lines = [line for line in capfd.readouterr().err.splitlines() if "fl-adapters" in line]
    assert len(lines) == 1
    with pytest.raises(ConfigError, match="required=True"):
        m.trainer(FederatedCallback(required=True), pl=pl).fit(m.module(pl), m.loader())
