"""The global models of a run that are still needed: the newest, the best, and those that calls are streaming."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from fl_runtime.store.blobs import Blob, Blobs
from fl_runtime.store.journal import Journal
from fl_runtime.store.journal_entries import ModelEntry


@dataclass
class Model:
    """A committed global model. Changed only under the run's lock.

    Attributes:
        entry: The model's entry in the journal.
        blob: Its tensors, mapped from a file.
        strategy_state: Tensors that the strategy keeps at the server beside the newest model, or None.
        leases: Number of calls that are streaming the model. Its file is recycled after the last one.
        retired: True once no later task will carry this model.
        messages: Whole task messages of a small model, which is encoded once for all sites.
    """

    entry: ModelEntry
    blob: Blob
    strategy_state: Blob | None = None
    leases: int = 0
    retired: bool = False
    messages: dict[tuple[str, str, bool], bytes] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.entry.version


class Models:
    """The newest and the best global model, and the recycling of the others. Used under the run's lock.

    Attributes:
        newest: The newest global model.
        best: The best one among those that have been replaced, or None.
        held: The newest model as the sites of the round have it, if an encoding at `server_out` changes it; else None.
    """

    def __init__(self, journal: Journal, blobs: Blobs, lock: threading.RLock) -> None:
        self._journal, self._blobs, self._lock = journal, blobs, lock
        self.newest: Model | None = None
        self.best: Model | None = None
        self.held: Model | None = None

    @property
    def version(self) -> int:
        """Version of the newest model; 0 also before there is one."""
        return self.newest.version if self.newest else 0

    @property
    def best_version(self) -> int | None:
        """Version of the best model among those that have been replaced, or None if there is none yet."""
        return self.best.version if self.best else None

    def release(self, model: Model) -> None:
        """Give back a lease. May be called without the lock."""
        with self._lock:
            model.leases -= 1
            if model.retired:
                self.recycle(model)

    def retire(self, model: Model) -> None:
        """Remove a model that no later task will carry from the journal, and recycle its file."""
        self._journal.forget_model(model.version)
        self.recycle(model)

    def recycle(self, model: Model) -> None:
        """Free a model's file for reuse, now or when the last call that streams it has ended."""
        model.retired = True
        if model.leases == 0:
            self._blobs.free(model.blob)

    def blob_names(self) -> set[str]:
        """Names of the files that the newest and the best model lie in."""
        names = {model.blob.name for model in (self.newest, self.best) if model}
        if self.newest and self.newest.strategy_state:
            names.add(self.newest.strategy_state.name)
        return names
