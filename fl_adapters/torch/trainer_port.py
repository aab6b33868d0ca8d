"""What a federated training needs of a torch trainer: the protocol `TrainerPort`, which a framework implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fl_adapters.participant.restart import not_restartable
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import Progress
from fl_adapters.torch.restart import TorchSnapshot
from fl_runtime.wire.names import Names


@dataclass(frozen=True)
class Resumed:
    """The checkpoint from which a trainer resumed before `TrainerRun.begin`.

    Attributes:
        job: Name of the run in which the checkpoint was saved. None if it was saved outside a federation.
        progress: Where the site stood in that run.
        within_round: Whether the checkpoint was saved in the middle of a round.
        where: Name of the checkpoint for messages, such as "ckpt_path, at step 6".
        fix: What to do instead of resuming, if the checkpoint is of another run.
    """

    job: str | None
    progress: Progress
    within_round: bool
    where: str
    fix: str


class TrainerPort(Protocol):
    """What `TrainerRun` needs of a trainer. An adapter inherits from it and implements at least the first five.

    Called on every rank, in the thread that trains. A port belongs to one training and may hold the trainer's objects.
    """

    @property
    def steps(self) -> int:
        """Number of optimizer steps that the trainer has made so far, those before a resume included."""
        ...

    @property
    def where(self) -> str:
        """Where the trainer stands, for messages: "step 6 of 12"."""
        ...

    def stop(self) -> None:
        """Let the trainer end as soon as it can: the final weights are in the model."""
        ...

    def log(self, row: Mapping[str, float]) -> None:
        """Write a row about the round that just ended to the framework's own loggers.

        Args:
            row: `federation_round`, `federation_bytes_up`, `federation_bytes_down`, and `federation_seconds`.
        """
        ...

    def validate(self) -> None:
        """Score the model as it is on the trainer's own validation data, now.

        The adapter passes the result to `TrainerRun.report`, here or in a hook. Only called if the run `evaluates`.
        """
        ...

    def validate_next(self) -> None:
        """Let the trainer validate before it trains on. Replace it where the trainer has a validation of its own."""
        self.validate()

    def validate_unseen(self) -> None:
        """Like `validate`, but without a trace in the trainer's logs, checkpoints and best scores.

        The model holds another site's weights. Replace it where `validate` leaves a trace.
        """
        self.validate()

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch, or None if unknown."""
        return None

    @property
    def training_data(self) -> Any:
        """DataLoader of the training set, for DP-SGD."""
        return None

    def resumed(self) -> Resumed | None:
        """Return the checkpoint that the trainer resumed from.

        Returns:
            The checkpoint, or None if the trainer starts from the beginning.
        """
        return None

    def names(self) -> Mapping[str, Names]:
        """Return lists of names that the script's objects hold, which are compared between the sites.

        Returns:
            What a list is -> the list: label names, a tokenizer's vocabulary. Empty where nothing is known.
        """
        return {}

    def advance_schedules(self, epochs: int | None, steps: int | None) -> None:
        """Move the learning-rate schedules on to where the other sites are.

        Args:
            epochs: Epochs that the other sites have made, or None if unknown.
            steps: Optimizer steps that the other sites have made, or None if unknown.
        """

    def snapshot(self, live: LiveModel) -> TorchSnapshot:
        """State of this training that is saved after each round, for jobs with `exact_restart`.

        Args:
            live: The model and its optimizers, whose state the snapshot includes.

        Returns:
            The snapshot. After its `load`, `steps` is the number of steps that the process before had made.

        Raises:
            ConfigError: If this training cannot be restarted exactly, with the reason.
        """
        raise not_restartable(
            "this adapter does not save the state of its trainer", "set exact_restart: false in the job"
        )
