"""The function that virtual sites share: where it is found, and how it is called for one site and round."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fl_adapters.loop import SiteTask
from fl_adapters.participant import identity
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.restart import round_seed, seed_python
from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError, StateMismatchError
from fl_runtime.types import Array, Arrays, Metrics, Task
from fl_runtime.wire.finite import check_finite, check_weight
from fl_runtime.wire.manifest import Manifest, TensorSpec, differences

Function: TypeAlias = Callable[[SiteTask, identity.Site], None]
"""function(task, site): one site's work of one round, which ends with `task.submit(...)`."""
First: TypeAlias = Callable[[], Arrays] | Arrays
"""The first weights, or what gives them."""

_MODULE = "fl_virtual_site"
_FRAMES = 6


@dataclass(frozen=True)
class Place:
    """What a worker knows of the run. count: of the sites. layout: see `described`. seed: the job's. exchanges_all:
    the job does not pick tensors by patterns."""

    job: str
    count: int
    rounds: int
    seed: int | None
    layout: str
    exchanges_all: bool = True


def named(app: str) -> bool:
    """Whether an app is the name of a function: `train.py:train` or `package.module:train`."""
    place, colon, name = app.rpartition(":")
    return bool(colon) and name.isidentifier() and bool(place)


def load(app: str) -> tuple[Function, First | None]:
    """The function that `app` names, and `initial` beside it if there is one. ConfigError if there is no such thing;
    errors of the module itself are raised as they are."""
    place, _, name = app.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ConfigError(f"there is no script {place}", where=str(Path.cwd()), fix="check the path")
        sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
        spec = importlib.util.spec_from_file_location(_MODULE, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_MODULE] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"{place} has no function {name}", where=app, fix="name one that is at the module's top level"
        )
    return function, getattr(module, "initial", None)


def first_weights(initial: First | None) -> Arrays:
    """ConfigError if there are none."""
    found = initial() if callable(initial) else initial
    if not found or not isinstance(found, Mapping):
        raise ConfigError(
            "nobody gives the first weights",
            where="initial",
            fix="write a function initial() beside the other that returns a dict of name -> NumPy array, "
            "or give a file with Job(initial=)",
        )
    return {name: np.asarray(array) for name, array in found.items()}


def described(manifest: Manifest) -> str:
    """A manifest of weights as text; `Worker` reads it."""
    return json.dumps([(t.name, t.dtype, t.shape) for t in manifest.tensors])


class Worker:
    """Carries out one order after the other in this process."""

    def __init__(self, function: Function, place: Place) -> None:
        self._function, self._place, self._options = function, place, Options()
        specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(place.layout)]
        self._manifest = Manifest(tuple(specs))

    def work(self, order: Mapping[str, Any], model: Array, out: Array) -> dict[str, Any]:
        """The facts of the site's update, whose tensors are then in `out`. model, out: uint8, laid out alike; the
        model is only read. Raises a FederationError that names site and round.

        Random states of Python and NumPy are seeded for (job's seed, site, round), so that it does not matter which
        worker does it, and after what.
        """
        place, site = self._place, str(order["site"])
        when = f"{site}, round {order['round']}"
        out[:] = model
        arrays, _ = self._manifest.views(out)
        version = order["round"] - 1
        task = Task(place.job, order["round"], order["stage"], "train", version, arrays, config=order["config"])
        seed = round_seed(place.seed, site, task)
        seed_python(seed)
        taken = _Taken(self._manifest, arrays, out, when, seed, exchanges_all=place.exchanges_all)
        here = identity.Site(name=site, index=order["index"], count=place.count, job=place.job)
        try:
            with identity.standing_at(here):
                self._function(SiteTask(task, place.rounds, taken, self._options), here)
        except FederationError as error:
            raise _at(error, when) from error
        except Exception as error:
            raise _failed(error, site, order["round"]) from error
        if taken.facts is None:
            raise ConfigError(
                f"{site}'s function ended without a result in round {order['round']}",
                where=when,
                fix="call task.submit(arrays, num_examples=...) in it",
            )
        return taken.facts


class _Taken:
    """Where a task's result goes: into the buffer that the server reads. See `loop.Recipient`."""

    def __init__(
        self, manifest: Manifest, mine: Arrays, buffer: Array, when: str, seed: int, *, exchanges_all: bool
    ) -> None:
        self._manifest, self._mine, self._buffer, self._when = manifest, mine, buffer, when
        self.exchanges_all = exchanges_all
        self.round_seed = seed
        self.facts: dict[str, Any] | None = None
        self._scored: tuple[Metrics, int] | None = None

    def submit(self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None) -> str:
        check_weight(result.num_examples, where=self._when)
        if extras:
            raise ConfigError("virtual sites send weights alone, no extras", where=self._when, fix="leave extras out")
        if not self._fits(arrays):
            lines = differences(self._manifest, Manifest.of(arrays))
            raise StateMismatchError(
                f"an update differs from the model in {len(lines)} tensors (model != update):\n    "
                + "\n    ".join(lines[:8]),
                where=self._when,
                fix="submit what initial() has: the same names, shapes and dtypes",
            )
        check_finite(arrays, where=self._when)
        apart = {name: self._apart(name, array) for name, array in arrays.items()}
        for name, array in apart.items():
            if array is not self._mine[name]:
                self._mine[name][...] = array
        self.facts = {
            "num_examples": int(result.num_examples),
            "local_steps": int(result.local_steps),
            "metrics": {name: float(value) for name, value in result.metrics.items()},
            "scored": self._scored,
        }
        return "used"

    def report(self, metrics: Any, num_examples: int) -> None:
        self._scored = (plain(metrics), int(num_examples))
        if self.facts is not None:
            self.facts["scored"] = self._scored

    def _fits(self, arrays: Arrays) -> bool:
        mine = self._mine
        same = arrays.keys() == mine.keys()
        return same and all(a.shape == mine[n].shape and a.dtype == mine[n].dtype for n, a in arrays.items())

    def _apart(self, name: str, array: Array) -> Array:
        """An array that writing to the buffer does not change, or the very one that is there."""
        if array is self._mine[name] or not np.may_share_memory(array, self._buffer):
            return array
        return np.array(array)


def _at(error: FederationError, when: str) -> FederationError:
    at = error.where if when in error.where else f"{when}: {error.where}".removesuffix(": ")
    return FederationError.from_wire({**error.to_wire(), "where": at})


def _failed(error: Exception, site: str, round: int) -> SiteFailedError:
    """With the end of the trace, from the user's function on."""
    lines = traceback.format_exception(error)
    frames = "".join(lines[-_FRAMES:]).rstrip().splitlines()
    return SiteFailedError(
        f"{site}'s function failed in round {round}: {type(error).__name__}: {error}",
        where="\n".join([f"{site}, round {round}", *(f"    | {line}" for line in frames)]),
        fix="correct the function; it was called in a worker, whose output is in the run's folder workers/",
    )
