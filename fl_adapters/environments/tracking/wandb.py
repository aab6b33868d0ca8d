"""Sends a run to Weights & Biases, or to its files on this machine with WANDB_MODE=offline."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from fl_adapters.environments.tracking.files import artifacts
from fl_adapters.environments.tracking.records import Begin, End, Metrics, Record
from fl_runtime.errors import ConfigError

_NO_NETWORK = ("offline", "dryrun", "disabled")


class WandbTracker:
    """Tracker that has one W&B run for each run. Curves have the round as their axis.

    The settings of W&B itself hold (`WANDB_MODE`, `WANDB_ENTITY`, `WANDB_DIR`, ...).

    Args:
        project: The W&B project.

    Raises:
        ConfigError: The package is missing, or there is neither an API key nor offline mode.
    """

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracking by W&B needs the package wandb, which is not installed ({error})",
                where="track: wandb",
                fix="pip install 'fl-adapters[wandb]'",
            ) from None
        self._wandb: Any = wandb
        self._project = project
        self._runs: dict[str, Any] = {}
        if os.environ.get("WANDB_MODE") not in _NO_NETWORK and not wandb.api.api_key:
            raise ConfigError(
                "W&B does not know who you are: there is no API key on this machine",
                where="track: wandb",
                fix="run `wandb login`, or set WANDB_MODE=offline to write W&B's files here and sync them later",
            )

    def __call__(self, record: Record) -> None:
        """Log a record; see `Tracker`."""
        name = record.run.name
        match record:
            case Begin():
                if name not in self._runs:
                    self._runs[name] = self._begin(record)
            case Metrics(points=points):
                for number in dict.fromkeys(point.round for point in points):
                    values = {point.name: point.value for point in points if point.round == number}
                    self._runs[name].log({"round": number, **values})
            case End():
                self._end(self._runs.pop(name), record)

    def _begin(self, record: Begin) -> Any:
        run = self._wandb.init(
            project=self._project,
            name=record.run.name,
            id=hashlib.sha256(record.run.identity.encode()).hexdigest()[:20],
            resume="allow",
            reinit="create_new",
            config=dict(record.params),
            settings=self._wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        run.define_metric("round", hidden=True)
        run.define_metric("*", step_metric="round")
        return run

    def _end(self, run: Any, record: End) -> None:
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", record.run.name)[:100]
        files, models = artifacts(record.folder)
        record_of_run = self._wandb.Artifact(f"{stem}-record", type="record")
        for file in files:
            record_of_run.add_file(str(file), name=file.name)
        if files:
            run.log_artifact(record_of_run)
        for folder in models:
            model = self._wandb.Artifact(f"{stem}-{folder.name}", type="model")
            model.add_dir(str(folder))
            run.log_artifact(model)
        run.summary["state"] = record.state
        run.finish(exit_code=0 if record.state == "finished" else 1)
