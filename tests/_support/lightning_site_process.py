"""A site in its own process, forked from one that has imported Lightning; it can be killed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch", "lightning.pytorch", "pytorch_lightning", "safetensors.torch"])


def fit(kit: str | None, folder: Path, values: dict[str, Any], out: Path) -> None:
    """Run one fit with a checkpoint per epoch, and save its weights and learning rates to `out`."""
    os.chdir(folder)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import lightning_models as m
    import torch

    from fl_adapters.lightning import FederatedCallback

    torch.set_num_threads(1)
    pl = m.package(values["package"])

    class Die(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == values["dies_at"]:
                os._exit(9)

    torch.manual_seed(0)
    module = m.module(pl, dropout=0.0)
    checkpoint = pl.callbacks.ModelCheckpoint(save_top_k=-1, filename="{step}", **values.get("checkpoint", {}))
    trainer = m.trainer(FederatedCallback(kit=kit), pl=pl, callbacks=[Die(), checkpoint], enable_checkpointing=True)
    resume = {"ckpt_path": values["resume"]} if values.get("resume") else {}
    trainer.fit(module, m.loader(shuffle=False), m.validation(), **resume)
    torch.save({"weights": module.state_dict(), "rates": module.rates, "steps": trainer.global_step}, out)


class SiteProcess:
    def __init__(self, kit: str | None, folder: Path, **values: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out = folder, folder / f"out-{len(list(folder.iterdir()))}.pt"
        self.process = _forks.Process(target=fit, args=(kit, folder, {"dies_at": None, **values}, self.out))
        self.process.start()

    def died(self) -> None:
        """Wait until the process has died as planned."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == 9, self.log

    def result(self) -> dict[str, Any]:
        """Return what the process saved, or fail with its log."""
        import torch

        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == 0, self.log
        return dict(torch.load(self.out, weights_only=True))

    @property
    def log(self) -> str:
        """Return what the process printed."""
        return (self.folder / "log.txt").read_text()

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
