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
from typing import Any, Literal, Protocol

import numpy as np

from fl_adapters.participant.exchange import selected
from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.restart import FunctionSnapshot, seed_python
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_runtime.capabilities import FINAL_SCORE
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays, Metrics, Settings, Task
from fl_runtime.wire.manifest import Manifest, differences
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
    kit = current_kit(checked.kit)
    if kit is not None and (earlier := _at_their_end.get(kit)) is not None:
        earlier.finish()  # another training begins within its block
    return ConnectedSite(open_session(checked, framework="this loop", fresh=True), checked, kit)


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
        state = dict(_selected(initial, settings))
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
        chosen = _selected(initial, SiteSettings.resolve(self._options, {}))
        self.arrays = {name: np.array(array) for name, array in chosen}
        for number in range(1, rounds + 1):
            current = SiteTask(Task("", number, "", "train", number - 1, self.arrays), rounds, None, self._options)
            yield current
            current.check_submitted()
            self.arrays = current.submitted


def _sends_all(options: Options) -> bool:
    """Whether neither `exchange` nor `keep_local` of the script has name patterns."""
    settings = SiteSettings.resolve(options, {})
    return isinstance(settings.exchange, str) and not settings.keep_local


def _selected(initial: Arrays, settings: SiteSettings) -> Iterator[tuple[str, Array]]:
    given = _named(initial, "site.tasks(initial=...)")
    for name in selected(given, settings.exchange, settings.keep_local):
        yield name, as_array(name, given[name], "initial")


def _named(arrays: object, where: str) -> Mapping[str, Any]:
    """Return a dict of arrays that a script has passed. Raises ConfigError if it is something else, or empty."""
    if not isinstance(arrays, Mapping):
        raise ConfigError(
            f"{where} got a {type(arrays).__name__} instead of a dict of name -> NumPy array",
            fix='give every array a name, as in {"weight": w, "bias": b}',
        )
    if not arrays:
        raise ConfigError(f"{where} got no arrays", fix="pass a dict of name -> NumPy array")
    return arrays


def as_array(name: str, value: object, where: str) -> Array:
    """Return a value that a script gives as an array.

    Args:
        name: Name of the tensor.
        value: An array, a number, or an object that NumPy reads as an array.
        where: Where the script gives it, for errors.

    Returns:
        The array, not copied if it is one.

    Raises:
        ConfigError: It is a list or something else that is neither an array nor a number.
    """
    fix = f"pass np.asarray(value, dtype) for {name!r}"
    if isinstance(value, list | tuple | Mapping | str | bytes) or value is None:
        raise ConfigError(f"{name!r} is a {type(value).__name__}, not an array", where=where, fix=fix)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on another device, or one with a gradient
        raise ConfigError(
            f"{name!r} is a {type(value).__name__} that NumPy cannot read: {error}",
            where=where,
            fix=f"pass a NumPy array for {name!r}, for a tensor of PyTorch tensor.detach().cpu().numpy()",
        ) from error
    if array.dtype == object:
        raise ConfigError(f"{name!r} is a {type(value).__name__}, not an array of numbers", where=where, fix=fix)
    return array


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
        given = {} if isinstance(arrays, Mapping) and not arrays else _named(arrays, where)
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
