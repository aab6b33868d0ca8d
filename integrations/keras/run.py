"""Where a `fit` stands in its run: which round, how much of it is done, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_adapters.participant.session import RoundStats
from fl_runtime.types import Task

from .budget import Budget
from .fit_call import FitCall
from .scores import RoundMeter

_NEVER = 1 << 62


@dataclass
class Run:
    """One `fit` as a part of a federation.

    epoch: the one that runs, counted as fit does. batch: the first batch, within the epoch, of what runs now.
    before: batches of this round in earlier epochs, less those of this epoch that belong to the round before.
    epochs: those of this round that are over. phase: of the round, counted from 0; before and epochs, and what is due,
    are those of the phase. due, stops: batch within the epoch at which the round ends, and from
    which on a step is the last of the run. version: of the global model that arrived last. seed: of the round, for
    exact restarts.
    """

    fit: FitCall
    budget: Budget
    rounds: int
    evaluates: bool
    meter: RoundMeter = field(default_factory=RoundMeter)
    round: int = 0
    version: int = 0
    epoch: int = 0
    batch: int = -1
    before: int = 0
    epochs: int = 0
    phase: int = 0
    due: int = _NEVER
    stops: int = _NEVER
    epoch_open: bool = False
    stopping: bool = False  # it is us who end this fit
    over: bool = False  # the final weights have arrived
    awaits_score: bool = False
    seed: int | None = None
    row: dict[str, float] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)  # version -> epoch at whose end it was there

    def begin_epoch(self, epoch: int) -> None:
        """fit begins `epoch`."""
        self.epoch, self.batch, self.epoch_open = epoch, -1, True
        self.row = {"federation_bytes_up": 0.0, "federation_bytes_down": 0.0, "federation_seconds": 0.0}
        self.meter.begin_epoch()
        self._aim()

    def end_epoch(self) -> None:
        """The last step of the epoch is done. The last call of a compiled function may have run fewer batches."""
        made = self.batch + self.budget.execution if self.batch >= 0 else 0
        self.before += min(made, self.fit.steps or made)
        self.epochs += 1
        self.epoch_open = False
        self.due = self.stops = _NEVER

    def complete(self) -> bool:
        """Whether the epoch that has just ended ends a phase. The last one of fit's own budget may be shorter."""
        if self.at_end and self.round == self.rounds:
            return True
        return (self.before if self.budget.batches else self.epochs) >= self.budget.size

    @property
    def at_end(self) -> bool:
        """Whether the epoch that has just ended is fit's last, where its own budget decides."""
        return self.budget.rounds is None and not self.epoch_open and self.epoch + 1 >= self.fit.epochs

    def take(self, task: Task, turn: int) -> None:
        """A task has arrived, and its weights are in the model. turn: see `Session.local_round`."""
        self.round, self.version, self.over = turn, task.version, task.kind == "final"

    def next_round(self, stats: RoundStats) -> None:
        """The exchange is done, within the epoch or at its end; what is counted from here on is of the new round."""
        self._begin(0)
        self.row["federation_bytes_up"] += stats.bytes_up
        self.row["federation_bytes_down"] += stats.bytes_down
        self.row["federation_seconds"] += stats.seconds
        self.awaits_score = self.evaluates

    def next_phase(self) -> None:
        """A phase is over, and the round is not."""
        self._begin(self.phase + 1)

    def _begin(self, phase: int) -> None:
        self.before, self.epochs, self.phase = -self.batch if self.epoch_open else 0, 0, phase
        self._aim()

    def logs(self) -> dict[str, float]:
        """For the history: the global model's number, and what its exchanges in this epoch took."""
        return {"federation_round": float(self.version), **self.row}

    def _aim(self) -> None:
        if self.over and self.epoch_open:  # the run has ended sooner than this fit: no exchange, and no further step
            self.due, self.stops = _NEVER, 0
        elif self.budget.batches is not None and self.epoch_open:
            self.due = self.budget.batches - self.before
            last = self.round == self.rounds and self.phase + 1 == self.budget.phases
            self.stops = self.due - self.budget.execution if last else _NEVER
