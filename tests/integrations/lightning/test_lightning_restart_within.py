"""`exact_restart` with Lightning within a round: a site goes on from the last checkpoint of its script's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning_models as m
import pytest
import torch
from killed_sites import WarmProcess
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import Death, LocalFederation, Place

BATCHES = 6


class Augmented(Dataset):
    """Rows to which noise is added when they are read, here or in a worker."""

    def __len__(self) -> int:
        return m.BATCH * BATCHES

    def __getitem__(self, index: int) -> Any:
        x, y = m.rows(0, len(self))[index]
        return x + 0.1 * torch.randn(4), y


class KilledError(Exception):
    """Stands for the death of a process."""


@dataclass
class Fit:
    """One fit of a site, as its script would write it, and what is remembered of it.

    Attributes:
        checkpoints: Arguments of each ModelCheckpoint.
        options: Arguments of the Trainer; "float16" stands for half precision with a gradient scaler.
        module: Makes the module.
        workers: Worker processes of the data loader.
        validates: Whether there are validation data.
    """

    checkpoints: Sequence[dict[str, Any]] = ({"every_n_train_steps": 2, "save_top_k": -1},)
    options: dict[str, Any] = field(default_factory=dict)
    module: Callable[[Any], Any] = m.module
    workers: int = 0
    validates: bool = False

    def __call__(self, place: Place, dies_at: int, trained: list[int]) -> dict[str, Any]:
        """Train up to the batch of this number (0: to the end), or until a SIGTERM there if it is negative.

        Numbers of trained batches are appended to `trained`.
        """
        pl = m.package()

        class Dies(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                trained.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)
                if trained[-1] == -dies_at:
                    trainer._signal_connector.received_sigterm = True  # as in a process's main thread
                if trained[-1] == dies_at:
                    raise KilledError

        class Average(pl.Callback):
            """A moving average of the weights, and a count of hooks, both kept in the callback's state."""

            def __init__(self) -> None:
                self.mean: dict[str, Any] = {}
                self.hooks = 0

            def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
                self.hooks += 1

            def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
                self.hooks += 10

            def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
                for name, value in module.state_dict().items():
                    self.mean[name] = 0.9 * self.mean.get(name, value.float()) + 0.1 * value

            def state_dict(self) -> dict[str, Any]:
                return {"mean": self.mean, "hooks": self.hooks} if self.mean else {}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.mean, self.hooks = dict(state["mean"]), state["hooks"]

        torch.manual_seed(0)
        options = dict(self.options)
        if options.pop("float16", False):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
            options["plugins"] = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        module, average = self.module(pl), Average()
        patience = pl.callbacks.EarlyStopping("val_loss", patience=50) if self.validates else None
        savers = [pl.callbacks.ModelCheckpoint(dirpath=str(n), **more) for n, more in enumerate(self.checkpoints)]
        own = FederatedCallback(kit=place.kit, every="2 epochs", keep_local=["net.1.*"])
        callbacks = [average, own, Dies(), *savers, *([patience] if patience else [])]
        trainer = m.trainer(pl=pl, callbacks=callbacks, enable_checkpointing=bool(savers), max_epochs=9, **options)
        data = DataLoader(Augmented(), batch_size=m.BATCH, shuffle=True, num_workers=self.workers)
        trainer.fit(module, data, m.validation() if self.validates else None)
        assert all(type(callback).__module__ != "fl_adapters.lightning.restart" for callback in trainer.callbacks)
        assert all(Path(saver.best_model_path).exists() for saver in savers)
        return {
            "weights": {name: value.tolist() for name, value in module.state_dict().items()},
            "mean": {name: value.tolist() for name, value in average.mean.items()},
            "hooks": average.hooks,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "batches": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "fed" not in name},
            "waited": patience.wait_count if patience else 0,
        }


def run(fit: Fit, folder: Path, dies_at: Sequence[int] = ()) -> tuple[dict[str, Any], list[list[int]]]:
    """Run a site of its own through two rounds. Return what it ends with, and the batches that each process trained."""
    processes: list[list[int]] = []

    def site(place: Place) -> dict[str, Any]:
        for batch in (*dies_at, 0):
            processes.append([])
            try:
                return fit(place, batch, processes[-1])
            except (KilledError, SystemExit):  # what Lightning raises at SIGTERM is a SystemExit
                continue
        raise AssertionError

    settings: dict[str, Any] = {"rounds": 2, "exact_restart": True, "seed": 3, "folder": folder}
    with LocalFederation(sites=1, states=m.STATES, deaths=[Death("site-1")], **settings) as federation:
        ended = federation.run(site)["site-1"]
        reports = [dict(closed.metrics) for closed in federation.result().rounds]
        return {**ended, "reports": reports}, processes


def same_bits(fit: Fit, folder: Path, dies_at: Sequence[int]) -> list[list[int]]:
    """Compare a disturbed run with an undisturbed one; return the batches of each process."""
    expected, undisturbed = run(fit, folder / "undisturbed")
    assert undisturbed == [[*range(1, 4 * BATCHES + 1)]]
    actual, processes = run(fit, folder / "disturbed", dies_at)
    assert actual == expected
    return processes


def test_a_site_that_dies_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Three times, twice in one round. Shuffling, noise, dropout, AdamW, a schedule, batch statistics that stay."""
    processes = same_bits(Fit(), tmp_path, [5, 9, 22])
    assert [batches[0] for batches in processes] == [1, 5, 9, 21]


def logging(pl: Any) -> Any:
    """A module that logs the mean of a whole epoch's losses, and a torchmetrics accuracy over it."""

    class Logs(type(m.module(pl))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(2)
            self.epoch = -1

        def on_train_epoch_start(self) -> None:
            self.epoch = self.current_epoch  # an attribute that training_step needs

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert self.epoch == self.current_epoch
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("most", loss, on_epoch=True, reduce_fx="max")
            with torch.no_grad():
                self.accuracy(self.net(batch[0]), batch[1])
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            return loss

    return Logs()


def manual(pl: Any) -> Any:
    """A module that makes its own optimizer steps, each over the gradients of three batches."""

    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = m.network(), False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]) / 3)
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return m.optimizer_for(self.parameters())

    return Manual()


WEIGHTS_ALONE = {"every_n_epochs": 2, "save_weights_only": True}
VALIDATED = {"monitor": "val_loss", "save_top_k": -1}
CASES: dict[str, tuple[Fit, list[int], list[int]]] = {
    "epoch-ends": (Fit([{"every_n_epochs": 1}]), [8], [1, 7]),
    "accumulating": (Fit(options={"accumulate_grad_batches": 4}), [11, 21], [1, 7, 19]),
    "validated-within-a-window": (
        Fit([VALIDATED], {"accumulate_grad_batches": 4, "val_check_interval": 5}, validates=True),
        [9, 18],
        [1, 6, 18],
    ),
    "validated-within-an-epoch": (Fit([VALIDATED], {"val_check_interval": 0.5}, validates=True), [5, 11], [1, 4, 10]),
    "several-savers": (
        Fit(
            [
                {"every_n_train_steps": 3, "save_last": True},
                {"every_n_epochs": 1},
                {"every_n_epochs": 2, "save_weights_only": True},
            ]
        ),
        [5, 8],
        [1, 4, 7],
    ),
    "at-any-time": (Fit([{"train_time_interval": timedelta(microseconds=1)}]), [5], [1, 5]),
    "workers": (Fit(workers=2), [5, 9], [1, 5, 9]),
    "float16": (Fit([{"train_time_interval": timedelta(microseconds=1)}], {"float16": True}), [14], [1, 14]),
    "logged-over-epochs": (Fit(module=logging), [4, 10], [1, 3, 9]),
    "manual-optimization": (Fit([{"train_time_interval": timedelta(microseconds=1)}], module=manual), [5], [1, 1]),
}


@pytest.mark.parametrize(("fit", "dies_at", "begins"), CASES.values(), ids=CASES.keys())
def test_with(fit: Fit, dies_at: list[int], begins: list[int], tmp_path: Path) -> None:
    assert [batches[0] for batches in same_bits(fit, tmp_path, dies_at)] == begins


def test_a_sigterm_saves_a_point_of_its_own(tmp_path: Path) -> None:
    """As a site daemon sends it that stops. Lightning ends between two batches."""
    fit = Fit([{"every_n_train_steps": 6, "save_top_k": -1}], {"accumulate_grad_batches": 2})
    assert [batches[0] for batches in same_bits(fit, tmp_path, [-5, -9])] == [1, 6, 10]


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import lightning_models as m, torch
from fl_adapters.lightning import FederatedCallback
pl = m.package()

class Dies(pl.plugins.io.TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, *rest, **more):
        step = checkpoint["global_step"]
        if step in {steps} and not Path(f"died-{{step}}").exists():
            Path(f"died-{{step}}").touch()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(b"half of a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(checkpoint, path, *rest, **more)

os.chdir({here!r})
torch.manual_seed(0)
saver = pl.callbacks.ModelCheckpoint(dirpath="saved", every_n_train_steps=2)
module = m.module(pl)
trainer = m.trainer(FederatedCallback(every="2 epochs"), callbacks=[saver], plugins=[Dies()], enable_checkpointing=True)
trainer.fit(module, m.loader(count=48))
torch.save([module.state_dict(), len(module.losses)], "ended.pt")
"""


def test_killed_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    """SIGKILL, with half of a checkpoint on disk, twice in the first round and once in the second."""

    def ended(folder: Path, steps: Sequence[int]) -> tuple[dict[str, Any], int]:
        folder.mkdir()
        script = folder / "train.py"
        script.write_text(SCRIPT.format(folder=str(Path(m.__file__).parent), here=str(folder), steps=list(steps)))
        settings: dict[str, Any] = {"rounds": 2, "exact_restart": True, "seed": 3, "folder": folder / "run"}
        with LocalFederation(sites=1, sockets=True, **settings) as federation:
            log = folder / "log.txt"
            statuses = []
            while not statuses or (statuses[-1] and len(statuses) <= len(steps)):
                statuses.append(warm.start(script, federation.places[0].kit, log).wait(60))
            assert len(statuses) == 1 + len(steps) and not statuses[-1], log.read_text()
        assert "at most 2 steps, those since the last checkpoint (every_n_train_steps=2)" in log.read_text()
        weights, batches = torch.load(folder / "ended.pt", weights_only=True)
        return {name: value.tolist() for name, value in weights.items()}, batches

    with WarmProcess("lightning.pytorch") as warm:
        expected, all_batches = ended(tmp_path / "undisturbed", ())
        assert all_batches == 24
        assert ended(tmp_path / "disturbed", (4, 8, 20)) == (expected, 24 - 18), "begins after the point at step 18"


def cost(fit: Fit, folder: Path, capfd: pytest.CaptureFixture[str], **settings: Any) -> str:
    """What the site says of restarts at its start."""
    settings = {"rounds": 1, "exact_restart": True, "folder": folder, **settings}
    with LocalFederation(sites=1, states=m.STATES, **settings) as federation:
        federation.run(lambda place: fit(place, 0, []))
    return capfd.readouterr().err.partition("exact_restart: ")[2].partition("\n")[0]


NO_POINTS = {
    "has no ModelCheckpoint": Fit([]),
    "save_weights_only=True": Fit([{"every_n_train_steps": 1, "save_weights_only": True}]),
    "every_n_train_steps=N saves within": Fit([{"every_n_epochs": 2}]),
    "reload_dataloaders_every_n_epochs": Fit(options={"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("reason", NO_POINTS)
def test_without_points_within_a_round_the_reason_is_told(
    reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = cost(NO_POINTS[reason], tmp_path, capfd)
    assert told.startswith("a restart repeats the round from its beginning: ") and reason in told


def test_strategies_that_record_steps_have_no_points_within_a_round(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "what the strategy records" in cost(Fit(), tmp_path, capfd, strategy="scaffold")


def test_a_file_that_depends_on_a_score_is_no_regular_point(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = cost(Fit([{**VALIDATED, "every_n_train_steps": 2}], validates=True), tmp_path, capfd)
    assert told == "a restart repeats the steps since the last checkpoint"
