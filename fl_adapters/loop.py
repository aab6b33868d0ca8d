"""For any other loop: `with fl.connect() as site: for task in site.tasks(initial=arrays): ... task.submit(...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np

from fl_adapters.participant.exchange import selected
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.restart import FunctionSnapshot, seed_python
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics, Settings, Task


def connect(**options: Any) -> ConnectedSite:
    """This process as a participant; without a startup kit, one that runs alone for one round.

    Takes the arguments that all adapters share (kit, keep_local, exchange, num_examples, required, ...), as
    keywords. Raises ConfigError for a bad argument and ConnectionLostError if the server cannot be reached.
    """
    checked = Options(**options)
    return ConnectedSite(open_session(checked, framework="this loop", fresh=True), checked)


class ConnectedSite:
    """A participant driven by a loop of the user's own. Leave the `with` block to leave the run.

    arrays: the newest global model; after the loop, the final one. Owned by the caller from then on.
    """

    def __init__(self, session: Session | None, options: Options) -> None:
        self._session, self._options = session, options
        self.arrays: Arrays = {}
        self.name = session.name if session else "local"
        self.index = session.site.index if session else 0
        self.count = session.site.count if session else 1
        self.job = session.job if session else ""

    def __enter__(self) -> ConnectedSite:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._session is not None:
            self._session.leave(f"{kind.__name__}: {error}" if kind else "its loop ended before the last round")
        return False

    def tasks(
        self,
        *,
        initial: Arrays,
        rounds: int | None = None,
        agreement: dict[str, str] | None = None,
        evaluate: Callable[[Arrays], tuple[Metrics, int]] | None = None,
        save: Callable[[], State] | None = None,
        load: Callable[[State], None] | None = None,
    ) -> Iterator[SiteTask]:
        """One task per round. initial: this site's weights (all sites must have the same names, shapes, dtypes);
        they start the model where the job gives no file and this is the first site. Borrowed until the first task.

        rounds: how many, where the job does not say; alone, 1 by default. agreement: further facts that must be
        equal at all sites. evaluate: (metrics, number of examples) of some weights on this site's validation data; a
        job with `cross_site` asks for those of every site's weights after the last round. Raises StateMismatchError
        or HandshakeError when the sites do not fit together.

        save, load: for a job with `exact_restart`. save() gives all that this loop carries from round to round beside
        the weights that travel (an optimizer's moments, weights that stay; nested lists and dicts of plain values and
        arrays; `dict` for a loop that carries nothing). It is called before round 1, and by `task.submit`, which must
        be the round's last act. load(state) is called, before the first task, in a process that comes back. `random`
        and `np.random` are seeded for every round; seed others by `task.seed`.
        """
        if self._session is None:
            yield from self._alone(initial, rounds or 1)
            return
        session, mine = self._session, dict(self._travelling(initial, self._session.settings))
        rounds = session.register(
            mine,
            agreement=agreement or {},
            rounds=rounds,
            evaluates=False,
            cross_evaluates=evaluate is not None,
            restarts=save is not None,
        )
        task = session.start(lambda: mine, snapshot=FunctionSnapshot(save, load or _nothing) if save else None)
        while task.kind == "train":
            if session.round_seed is not None:
                seed_python(session.round_seed)
            current = SiteTask(task, rounds, session, self._options)
            yield current
            current.check_submitted()
            task = session.next_task()
        self.arrays = task.arrays  # nothing else comes into this buffer
        if evaluate is not None:
            self.arrays = {name: np.copy(array) for name, array in task.arrays.items()}  # but for models to score
            session.results.cross_evaluate(evaluate)
        session.finish()

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """The score of the newest global model on this site's own validation data; alone it does nothing."""
        if self._session is not None and not self._session.closed:
            self._session.report(metrics, num_examples)

    def _travelling(self, initial: Arrays, settings: SiteSettings) -> Iterator[tuple[str, Any]]:
        if not initial:
            raise ConfigError("tasks(initial=...) got no arrays", fix="pass a dict of name -> NumPy array")
        for name in selected(initial, settings.exchange, settings.keep_local):
            yield name, np.asarray(initial[name])

    def _alone(self, initial: Arrays, rounds: int) -> Iterator[SiteTask]:
        self.arrays = {name: np.array(array) for name, array in initial.items()}
        for number in range(1, rounds + 1):
            current = SiteTask(Task("", number, "", "train", number - 1, self.arrays), rounds, None, self._options)
            yield current
            current.check_submitted()
            self.arrays = current.submitted


def _nothing(state: State) -> None:
    """What a loop without a `load` does with its state."""


class Recipient(Protocol):
    """Where the result of a task goes: a Session, or the worker of a virtual site. exchanges_all: every tensor given is
    meant to travel."""

    @property
    def round_seed(self) -> int | None: ...
    @property
    def exchanges_all(self) -> bool: ...
    def submit(self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None) -> str: ...
    def report(self, metrics: Metrics, num_examples: int) -> None: ...


class SiteTask:
    """One round's work. round, rounds: which of how many. arrays: the global model, valid until the next task and
    free to be changed in place. config: what the strategy says to the sites. seed: with `exact_restart`, and at virtual
    sites, what to seed this round's shuffling with, below 2**63; else None."""

    def __init__(self, task: Task, rounds: int, session: Recipient | None, options: Options) -> None:
        self._session, self._options = session, options
        self.round, self.rounds = task.round, rounds
        self.arrays: Arrays = task.arrays
        self.config: Settings = task.config
        self.seed = session.round_seed if session else None
        self.submitted: Arrays = {}

    def submit(
        self,
        arrays: Arrays,
        *,
        num_examples: int,
        metrics: Metrics | None = None,
        local_steps: int = 0,
        extras: Arrays | None = None,
    ) -> None:
        """Send this round's result, once. num_examples: its weight in the average, > 0 (an argument of connect()
        overrides it). Arrays are borrowed for the call. Raises UpdateRefusedError for what the server would not
        take: no examples, NaN or infinite values; StateMismatchError for other tensors than agreed."""
        if self.submitted:
            raise ConfigError(f"round {self.round} was submitted already", fix="call task.submit(...) once per task")
        if self._session is not None:
            sent = {name: np.asarray(arrays[name]) for name in self.arrays if name in arrays}
            self._session.submit(
                sent | {name: np.asarray(a) for name, a in arrays.items() if name not in sent and self._foreign(name)},
                LocalResult(self._options.num_examples or num_examples, local_steps, metrics or {}),
                extras=extras,
            )
        self.submitted = arrays

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """The score of `arrays`, as they arrived, on this site's own validation data; alone it does nothing."""
        if self._session is not None:
            self._session.report(metrics, num_examples)

    def check_submitted(self) -> None:
        """Raises ConfigError if the loop went on without `submit`."""
        if not self.submitted:
            raise ConfigError(
                f"round {self.round} ended without a result",
                fix="call task.submit(arrays, num_examples=...) in the loop",
            )

    def _foreign(self, name: str) -> bool:
        """Whether a submitted tensor is one that nobody asked for, rather than one that stays at the site."""
        assert self._session is not None
        return self._session.exchanges_all
