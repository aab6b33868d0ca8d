"""Loads the function that virtual sites share, and calls it for one site and round."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fl_adapters.loop import SiteTask, as_array
from fl_adapters.participant import identity
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.restart import round_seed, seed_python
from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.errors import ConfigError, FederationError, SiteFailedError, StateMismatchError
from fl_runtime.types import Array, Arrays, Metrics, Task
from fl_runtime.wire.finite import check_finite, check_weight
from fl_runtime.wire.manifest import Manifest, TensorSpec, differences

SiteFunction: TypeAlias = Callable[[SiteTask, identity.Site], None]
"""One site's work of one round: function(task, site) ends with `task.submit(...)`."""
InitialWeights: TypeAlias = Callable[[], Arrays] | Arrays
"""Weights before round 1 by name, or a function that returns them."""

_MODULE = "fl_virtual_site"
_FRAMES = 6


@dataclass(frozen=True)
class RunInfo:
    """Facts of the run that every worker needs.

    Attributes:
        job: Name of the job.
        count: Number of sites.
        rounds: Number of rounds.
        seed: Seed of the job, or None.
        layout: Names, dtypes and shapes of the weights, as `encode_layout` writes them.
        exchanges_all: Whether all tensors travel; False if the job selects some by patterns.
        data: Site -> path or address of its data.
    """

    job: str
    count: int
    rounds: int
    seed: int | None
    layout: str
    exchanges_all: bool = True
    data: dict[str, str] = field(default_factory=dict)


def names_function(app: str) -> bool:
    """Whether an app names a function, as `train.py:train` or `package.module:train`."""
    module, colon, name = app.rpartition(":")
    return bool(colon) and name.isidentifier() and bool(module)


def load(app: str) -> tuple[SiteFunction, InitialWeights | None]:
    """Import the function that `app` names, and `initial` from the same module if it exists.

    Raises ConfigError if there is no such script or function. Errors of the module itself are raised as they are.
    """
    module_name, _, name = app.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ConfigError(f"there is no script {module_name}", where=str(Path.cwd()), fix="check the path")
        sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
        spec = importlib.util.spec_from_file_location(_MODULE, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_MODULE] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"{module_name} has no function {name}", where=app, fix="name a function at the module's top level"
        )
    return function, getattr(module, "initial", None)


def initial_weights(initial: InitialWeights | None) -> Arrays:
    """The weights before round 1 as NumPy arrays. Raises ConfigError if there are none."""
    arrays = initial() if callable(initial) else initial
    if not arrays or not isinstance(arrays, Mapping):
        raise ConfigError(
            "there are no initial weights",
            where="initial",
            fix="write a function initial() in the same module that returns a dict of name -> NumPy array, "
            "or name a file with Job(initial=)",
        )
    return {name: as_array(name, array, "initial") for name, array in arrays.items()}


def encode_layout(manifest: Manifest) -> str:
    """Names, dtypes and shapes of a manifest as JSON, for `OrderRunner`."""
    return json.dumps([(t.name, t.dtype, t.shape) for t in manifest.tensors])


class OrderRunner:
    """Runs orders, one after the other, in this process: calls the function for a site and a round.

    Args:
        function: The function that all sites share.
        info: Facts of the run.
    """

    def __init__(self, function: SiteFunction, info: RunInfo) -> None:
        self._function, self._info, self._options = function, info, Options()
        specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(info.layout)]
        self._manifest = Manifest(tuple(specs))

    def work(self, order: Mapping[str, Any], model: Array, out: Array) -> dict[str, Any]:
        """Run one order.

        The random states of Python and NumPy are seeded by the job's seed, the site and the round. The result does
        not depend on which worker runs the order, nor on what it ran before.

        Args:
            order: The fields of an `Order`.
            model: Global weights as uint8, laid out as `RunInfo.layout` says. Only read.
            out: Buffer of the same size that receives the site's weights.

        Returns:
            All of the update but its tensors: `num_examples`, `local_steps`, `metrics` and `scored`.

        Raises:
            FederationError: The function failed, or submitted nothing. The error names site and round.
        """
        info, site = self._info, str(order["site"])
        when = f"{site}, round {order['round']}"
        out[:] = model
        arrays, _ = self._manifest.views(out)
        version = order["round"] - 1
        task = Task(info.job, order["round"], order["stage"], "train", version, arrays, config=order["config"])
        seed = round_seed(info.seed, site, task)
        seed_python(seed)
        recipient = _UpdateRecipient(self._manifest, arrays, out, when, seed, exchanges_all=info.exchanges_all)
        here = identity.Site(site, order["index"], info.count, info.job, info.data.get(site))
        try:
            with identity.standing_at(here):
                self._function(SiteTask(task, info.rounds, recipient, self._options), here)
        except FederationError as error:
            raise _with_place(error, when) from error
        except Exception as error:
            raise _failed(error, site, order["round"]) from error
        if recipient.facts is None:
            raise ConfigError(
                f"{site}'s function returned without a submitted update in round {order['round']}",
                where=when,
                fix="call task.submit(arrays, num_examples=...) in the function",
            )
        return recipient.facts


class _UpdateRecipient:
    """Writes the update of one task into the buffer that the server reads. Implements `loop.Recipient`."""

    def __init__(
        self, manifest: Manifest, views: Arrays, buffer: Array, when: str, seed: int, *, exchanges_all: bool
    ) -> None:
        self._manifest, self._views, self._buffer, self._when = manifest, views, buffer, when
        self.exchanges_all = exchanges_all
        self.round_seed = seed
        self.facts: dict[str, Any] | None = None
        self._scored: tuple[Metrics, int] | None = None

    def submit(self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None) -> str:
        check_weight(result.num_examples, where=self._when)
        if extras:
            raise ConfigError("virtual sites cannot send extras", where=self._when, fix="leave extras out")
        if not self._fits(arrays):
            lines = differences(self._manifest, Manifest.of(arrays))
            raise StateMismatchError(
                f"an update differs from the model in {len(lines)} tensors (model != update):\n    "
                + "\n    ".join(lines[:8]),
                where=self._when,
                fix="submit arrays with the names, shapes and dtypes of initial()",
            )
        check_finite(arrays, where=self._when)
        separate = {name: self._detach(name, array) for name, array in arrays.items()}
        for name, array in separate.items():
            if array is not self._views[name]:
                self._views[name][...] = array
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
        views = self._views
        same = arrays.keys() == views.keys()
        return same and all(a.shape == views[n].shape and a.dtype == views[n].dtype for n, a in arrays.items())

    def _detach(self, name: str, array: Array) -> Array:
        """Copy an array that shares memory with another part of the buffer, which writing there would change."""
        if array is self._views[name] or not np.may_share_memory(array, self._buffer):
            return array
        return np.array(array)


def _with_place(error: FederationError, when: str) -> FederationError:
    where = error.where if when in error.where else f"{when}: {error.where}".removesuffix(": ")
    return FederationError.from_wire({**error.to_wire(), "where": where})


def _failed(error: Exception, site: str, round: int) -> SiteFailedError:
    """The error of a function, with the last lines of its traceback."""
    lines = traceback.format_exception(error)
    frames = "".join(lines[-_FRAMES:]).rstrip().splitlines()
    return SiteFailedError(
        f"{site}'s function failed in round {round}: {type(error).__name__}: {error}",
        where="\n".join([f"{site}, round {round}", *(f"    | {line}" for line in frames)]),
        fix="correct the function; the output of its worker is in the run's folder workers/",
    )
