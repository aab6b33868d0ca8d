"""One round of training in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fl_adapters.loop.arrays import as_array, named
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Arrays, Metrics, Settings, Task
from fl_runtime.wire.manifest import Manifest, differences


class Recipient(Protocol):
    """Takes the result of a task: a `Session`, or the worker of a virtual site."""

    @property
    def round_seed(self) -> int | None:
        """Seed for all random states of the round, or None if the job does not ask for one."""
        ...

    @property
    def exchanges_all(self) -> bool:
        """Whether everything that is submitted travels, because no pattern selects tensors."""
        ...

    def submit(self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None) -> str:
        """Send the update of a round; see `Session.submit`."""
        ...

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of the task's model; see `Session.report`."""
        ...


class SiteTask:
    """One round of training at this site.

    Attributes:
        round: Number of this round, from 1.
        rounds: Number of rounds of the run.
        arrays: The global model, tensor name -> array. Valid until the next task; may be changed in place.
        config: Settings from the strategy for this round.
        seed: Seed for this round's shuffling, from 0 to 2**63 - 1, at virtual sites and in jobs with `exact_restart`;
            else None.
        submitted: The arrays that were submitted; empty before `submit`.
        steps: How far this round is, as `progress` was told; None before.

    Example:
        ```python
        import numpy as np

        import fl_adapters as fl


        def train(task: fl.SiteTask) -> None:
            task.submit({"w": task.arrays["w"] + 1}, num_examples=100, metrics={"train_loss": 1 / task.round})


        with fl.connect() as site:
            for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
                train(task)
        ```
    """

    def __init__(self, task: Task, rounds: int, session: Recipient | None, options: Options) -> None:
        self._session, self._options = session, options
        self.round, self.rounds = task.round, rounds
        self.arrays: Arrays = task.arrays
        self.config: Settings = task.config
        self.seed = session.round_seed if session else None
        self.submitted: Arrays = {}
        self.steps: StepCount | None = None
        self._agreed = {name: (array.dtype, array.shape) for name, array in task.arrays.items()}
        self._sends_all = session.exchanges_all if session else _sends_all(options)

    def progress(self, done: int, total: int = 0) -> None:
        """Say how far this round is, for the screens of those who follow the run.

        Call it after each step: it only notes the numbers. They are sent at most once a second, if the site's policy
        allows it. Does nothing if the site runs alone, or at a virtual site.

        Args:
            done: Steps of this round so far.
            total: Steps of the whole round; 0 if unknown.

        Example:
            ```python
            for number, batch in enumerate(batches, 1):
                train_on(batch)
                task.progress(number, len(batches))
            ```
        """
        self.steps = StepCount(done, total)

    def submit(
        self,
        arrays: Arrays,
        *,
        num_examples: int,
        metrics: Metrics | None = None,
        local_steps: int = 0,
        extras: Arrays | None = None,
    ) -> None:
        """Send this round's update. Call it once per task.

        Args:
            arrays: The trained weights, with the names, shapes and dtypes of `initial`. Tensors that `exchange` or
                `keep_local` leave out may be among them. Borrowed for the call.
            num_examples: Number of training examples, above 0: the weight in the average. The argument
                `num_examples` of `connect` overrides it.
            metrics: Training metrics of this round.
            local_steps: Number of optimizer steps in this round. Some strategies require it.
            extras: Arrays that travel beside the weights. Borrowed for the call.

        Raises:
            ConfigError: This task was submitted already, or `arrays` is not a dict of arrays.
            UpdateRefusedError: There are no examples, or values are not finite.
            StateMismatchError: The tensors are not those of `initial`. Raised before anything is sent.
        """
        if self.submitted:
            raise ConfigError(f"round {self.round} was submitted already", fix="call task.submit(...) once per task")
        sent = self._checked(arrays)
        if self._session is not None:
            self._session.submit(
                sent,
                LocalResult(self._options.num_examples or num_examples, local_steps, metrics or {}),
                extras=extras,
            )
        self.submitted = sent

    def _checked(self, arrays: object) -> Arrays:
        """Return the arrays that travel. Raises an error if they are not those of the task, in dtypes and shapes."""
        where = f"task.submit(...), round {self.round}"
        given = {} if isinstance(arrays, Mapping) and not arrays else named(arrays, where)
        names = dict.fromkeys([*(name for name in self._agreed if name in given), *(given if self._sends_all else ())])
        sent = {name: as_array(name, given[name], where) for name in names}
        if {name: (array.dtype, array.shape) for name, array in sent.items()} == self._agreed:
            return sent
        agreed = {name: np.empty(shape, dtype) for name, (dtype, shape) in self._agreed.items()}
        lines = differences(Manifest.of(agreed), Manifest.of(sent))
        if not lines:  # only the order of bytes differs
            return sent
        drifted = [
            n for n, a in sent.items() if n in agreed and agreed[n].shape == a.shape and agreed[n].dtype != a.dtype
        ]
        fix = "submit arrays with the names, shapes and dtypes of initial="
        if drifted and len(drifted) == len(lines):
            name, dtype = drifted[0], agreed[drifted[0]].dtype.name
            fix = (
                f"{name!r} has become {sent[name].dtype} in the training: submit array.astype({dtype!r}), or keep all "
                f"that the loop adds to it and multiplies it with in {dtype}"
            )
        raise StateMismatchError(
            f"the update differs from the agreed model in {len(lines)} tensors (agreed != update):\n    "
            + "\n    ".join(lines[:8]),
            where=where,
            fix=fix,
        )

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of `arrays` as they arrived. Does nothing if the site runs alone.

        Args:
            metrics: Metrics on this site's own validation data.
            num_examples: Number of validation examples.
        """
        if self._session is not None:
            self._session.report(metrics, num_examples)

    def check_submitted(self) -> None:
        """Check that the loop did not go on without `submit`.

        Raises:
            ConfigError: Nothing was submitted.
        """
        if not self.submitted:
            raise ConfigError(
                f"round {self.round} ended without a result",
                fix="call task.submit(arrays, num_examples=...) in the loop",
            )


def _sends_all(options: Options) -> bool:
    """Whether neither `exchange` nor `keep_local` of the script has name patterns."""
    settings = SiteSettings.resolve(options, {})
    return isinstance(settings.exchange, str) and not settings.keep_local
