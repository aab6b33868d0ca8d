"""`connect`: take part in a federation from a training loop of your own.

Example:
    ```python
    import numpy as np

    import fl_adapters as fl

    weights = {"w": np.zeros(3, np.float32)}
    with fl.connect() as site:
        for task in site.tasks(initial=weights):
            trained = {name: array + 1 for name, array in task.arrays.items()}
            task.submit(trained, num_examples=100, metrics={"train_loss": 0.5})
    print(site.arrays)
    ```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Literal

import numpy as np

from fl_adapters.loop.arrays import selected_arrays
from fl_adapters.loop.site_task import SiteTask
from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.restart import FunctionSnapshot, seed_python
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_runtime.capabilities import FINAL_SCORE
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics, Task
from fl_runtime.wire.names import facts_of


def connect(**options: Any) -> ConnectedSite:
    """Join the federation that this process belongs to.

    Without a startup kit, the loop runs alone: for one round, unless it asks for more.

    Args:
        **options: The arguments that all adapters share, such as `kit`, `keep_local`, `exchange`, `num_examples` and
            `required`.

    Returns:
        The site, to be used in a `with` block.

    Raises:
        ConfigError: An argument cannot work, or the kit cannot be read.
        ConnectionLostError: The server cannot be reached.

    Example:
        ```python
        import numpy as np

        import fl_adapters as fl

        with fl.connect() as site:
            for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
                trained = {name: array + 1 for name, array in task.arrays.items()}
                task.submit(trained, num_examples=100)
        ```
    """
    checked = Options(**options)
    kit = finish_earlier(checked.kit)
    return ConnectedSite(open_session(checked, framework="this loop", fresh=True), checked, kit)


def finish_earlier(kit: str | None) -> Kit | None:
    """End a loop of this process that is over, since another training begins within its block.

    Args:
        kit: Folder of the startup kit, as the script names it.

    Returns:
        The startup kit; None without one.
    """
    current = current_kit(kit)
    if current is not None and (earlier := _at_their_end.get(current)) is not None:
        earlier.finish()
    return current


_at_their_end: dict[Kit, ConnectedSite] = {}
"""Sites whose loop is over and whose block is not, so that they may still score the final model."""


class ConnectedSite:
    """A participant driven by a training loop of your own. Returned by `connect`.

    Leaving the `with` block before the last round leaves the run. Until the end of the block this site may `report` the
    score of the final model, so the run waits for it there.

    Attributes:
        name: Name of this site; "local" if it runs alone.
        index: Number of this site among those of the job, from 0.
        count: Number of sites in the job.
        job: Name of the job; "" if the site runs alone.
        data: Path or address of this site's own data; None if nobody has said, as when it runs alone.
        arrays: The final global model, after the loop over `tasks`. The caller owns it.

    Example:
        ```python
        import numpy as np

        import fl_adapters as fl

        with fl.connect() as site:
            for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
                task.submit({"w": task.arrays["w"] + 1}, num_examples=100)
        np.savez(f"{site.name}.npz", **site.arrays)
        ```
    """

    def __init__(self, session: Session | None, options: Options, kit: Kit | None = None) -> None:
        self._session, self._options, self._kit = session, options, kit
        self.arrays: Arrays = {}
        self.name = session.name if session else "local"
        self.index = session.site.index if session else 0
        self.count = session.site.count if session else 1
        self.job = session.job if session else ""
        self.data = session.site.data if session else None
        self._in_block = self._over = False

    def __enter__(self) -> ConnectedSite:
        self._in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._over:
            self.finish()
        elif self._session is not None:
            self._session.leave(LeaveReason.own("its loop ended before the last round") if error is None else error)
        return False

    def tasks(
        self,
        *,
        initial: Arrays,
        rounds: int | None = None,
        agreement: Mapping[str, str | Sequence[Any]] | None = None,
        evaluate: Callable[[Arrays], tuple[Metrics, int]] | None = None,
        save: Callable[[], State] | None = None,
        load: Callable[[State], None] | None = None,
    ) -> Iterator[SiteTask]:
        """Yield one task per round. Submit each before taking the next.

        `random` and `np.random` are seeded for every round in jobs with `exact_restart`; seed other generators with
        `task.seed`.

        Args:
            initial: This site's weights, tensor name -> array. Names, shapes and dtypes must be equal at all sites.
                The first site's weights start the global model, unless the job names a file. Borrowed until the first
                task.
            rounds: Number of rounds, at least 1, used only if the job does not specify it. Default 1 if the site runs
                alone.
            agreement: What must mean the same at all sites, by any name: texts, which every site must give, and lists,
                which are compared entry by entry with those of the sites that give one, such as `{"labels": ["cat",
                "dog"]}`.
            evaluate: Function from arrays to (metrics on this site's validation data, number of examples). It must not
                change the arrays. It scores the global model of every round as it arrives, the final one included, so
                that the server can pick the best round; not with `evaluate_global=False`. In jobs with `cross_site` it
                also scores every site's model after the last round. Not called if the site runs alone.
            save: Returns everything that the loop carries from round to round beside the weights that travel, such as
                the optimizer's moments: nested lists and dicts of plain values and arrays. Needed in jobs with
                `exact_restart`; pass `dict` if there is nothing. Called before round 1 and by `task.submit`, which
                must then be the last act of a round.
            load: Restores what `save` returned. Called before the first task in a process that replaces another one.

        Yields:
            The task of the next round.

        Raises:
            ConfigError: `initial` is not a dict of arrays, `rounds` is no number of rounds, `evaluate` does not return
                a pair, or a round ended without `task.submit`.
            StateMismatchError: The weights of the sites differ in names, shapes or dtypes.
            HandshakeError: The sites disagree in something else.
        """
        if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1):
            raise ConfigError(f"tasks(rounds={rounds!r}) is not a number of rounds", fix="give a whole number above 0")
        if self._session is None:
            yield from self._alone(initial, rounds or 1)
            return
        session, settings = self._session, self._session.settings
        state = dict(selected_arrays(initial, settings))
        scores = evaluate is not None and settings.evaluate_global is not False
        rounds = session.register(
            state,
            agreement=facts_of(agreement or {}),
            rounds=rounds,
            evaluates=scores,
            cross_evaluates=evaluate is not None,
            restarts=save is not None,
            capabilities=frozenset({FINAL_SCORE} if self._in_block and not scores else ()),
        )
        current: SiteTask | None = None
        snapshot = FunctionSnapshot(save, load or _ignore) if save else None
        task = session.start(lambda: state, snapshot=snapshot, steps=lambda: current.steps if current else None)
        while task.kind == "train":
            if evaluate is not None and scores and task.version > 0:
                session.report(*_score(evaluate, task.arrays))
            if session.round_seed is not None:
                seed_python(session.round_seed)
            current = SiteTask(task, rounds, session, self._options)
            yield current
            current.check_submitted()
            task = session.next_task()
        self.arrays = task.arrays  # no other task overwrites this buffer
        if evaluate is not None:
            if scores:
                session.report(*_score(evaluate, task.arrays))
            # the models to evaluate arrive in the same buffer
            self.arrays = {name: np.copy(array) for name, array in task.arrays.items()}
            session.results.cross_evaluate(lambda arrays: _score(evaluate, arrays))
        self._over = True
        if not self._in_block or self._kit is None:
            self.finish()
        else:
            _at_their_end[self._kit] = self  # until the end of the block, the final model may be scored

    def finish(self) -> None:
        """Leave the run at its end, after the loop over `tasks`. The end of the `with` block does it.

        Call it to let the run end before the block does, when no score of the final model follows.
        """
        if self._over and self._session is not None:
            self._over = False
            if self._kit is not None:
                _at_their_end.pop(self._kit, None)
            self._session.finish()

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of the current global model; after the loop, of the final one.

        Does nothing if the site runs alone.

        Args:
            metrics: Metrics on this site's own validation data.
            num_examples: Number of validation examples.

        Raises:
            ConfigError: This site has left the run already, so that its score would not count.
        """
        if self._session is None:
            return
        if self._session.closed:
            raise ConfigError(
                f"{self.name} has left the run, so a score of the final model comes too late",
                fix="call report(...) within the block `with fl_adapters.connect() as site:`, or pass evaluate= to "
                "site.tasks(...)",
            )
        self._session.report(metrics, num_examples)

    def _alone(self, initial: Arrays, rounds: int) -> Iterator[SiteTask]:
        chosen = selected_arrays(initial, SiteSettings.resolve(self._options, {}))
        self.arrays = {name: np.array(array) for name, array in chosen}
        for number in range(1, rounds + 1):
            current = SiteTask(Task("", number, "", "train", number - 1, self.arrays), rounds, None, self._options)
            yield current
            current.check_submitted()
            self.arrays = current.submitted


def _score(evaluate: Callable[[Arrays], tuple[Metrics, int]], arrays: Arrays) -> tuple[Metrics, int]:
    """Call the script's `evaluate`. Raises ConfigError if it returns anything but metrics and a number."""
    score = evaluate(arrays)
    if isinstance(score, tuple) and len(score) == 2 and isinstance(score[0], Mapping):
        return score[0], int(score[1])
    raise ConfigError(
        f"the function evaluate has returned a {type(score).__name__}, not metrics and a number of examples",
        where="site.tasks(evaluate=...)",
        fix='return a pair, as in ({"loss": loss}, len(validation_data))',
    )


def _ignore(state: State) -> None:
    """Stand in for `load` in a loop that carries no state."""
