"""The site's two points: what arrives is decoded and filtered, what leaves is filtered and encoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.filters import at_point, check_extras, check_filters, encodings
from fl_runtime.filters.base import (
    AUX,
    Budgeted,
    EncodingFilter,
    Facts,
    FactsFilter,
    FilterHost,
    Layout,
    LazyArrays,
    RunningFilter,
    layout_of,
    refuse,
    work_dtype,
    work_layout,
)
from fl_runtime.filters.ckks import Cipher, HomomorphicCKKS, is_encrypted
from fl_runtime.filters.ckks_key import site_cipher
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.filters.feedback import ErrorFeedback
from fl_runtime.filters.ledger import BudgetLimit
from fl_runtime.filters.server import applied_filters
from fl_runtime.types import Array, Arrays, Report, Settings, Task, Update, is_floating

F = TypeVar("F", Update, Report)


@dataclass(frozen=True)
class _Step:
    """A filter on what leaves, and at whose wish. opened: at work, for those that change values."""

    filter: Any
    host: FilterHost
    opened: RunningFilter | None = None


class SiteFilters:
    """Every filter of one site in one run, with what they remember. Used by one thread at a time.

    The arrays of an update are borrowed and not written to: what changes them works on buffers of this object's own,
    which are valid until the next update.
    """

    def __init__(self, job: Sequence[Settings], own: Sequence[Settings], host: FilterHost) -> None:
        """job: the list of the job, with all its points. own: the list of the site's policy, for what leaves."""
        check_filters(job)
        self._job, self._host = job, host
        self._arriving = encodings(at_point(job, "server_out"))
        self._held = [item for item in at_point(job, "site_in") if isinstance(item, ExcludeVars)]
        self._agreed: Layout = {}
        self._weights = True  # whether the tensors are weights
        self._kept: dict[str, Array] = {}  # this site's values of tensors that site_in does not take
        self._base: dict[str, Array] = {}
        self._work: dict[str, Array] = {}
        self._feedback = ErrorFeedback(host)
        self._steps: list[_Step] = []
        self._cipher: Cipher | None = None
        self._key = ""
        self.set_policy_filters(own, host.budget)

    def set_policy_filters(self, own: Sequence[Settings], budget: BudgetLimit | None = None) -> None:
        """The list of the site's policy, and the budget of all that is spent there; they hold from the next update on.
        ConfigError where they cannot work."""
        check_filters(own)
        strangers = [settings for settings in own if settings.get("at", "site_out") != "site_out"]
        if strangers:
            raise refuse(
                f"the filter {strangers[0]['name']} of the policy stands at {strangers[0]['at']}",
                "a policy's filters run on what leaves the site: leave `at` out",
            )
        before = {(step.filter, step.host): step for step in self._steps}
        steps = [
            before.get((item, host := replace(self._host, from_policy=mine, budget=budget))) or _opened(item, host)
            for mine, filters in ((False, self._job), (True, own))
            for item in at_point(filters, "site_out")
        ]
        check_filters([step.filter.settings() for step in steps])  # the job's and the site's together
        if any(step.host.from_policy and isinstance(step.filter, HomomorphicCKKS) for step in steps):
            raise refuse("HomomorphicCKKS in a policy would leave the other sites out", "ask for it in the job")
        last = [s for s in steps if encodings([s.filter]) or isinstance(s.filter, HomomorphicCKKS)]
        self._steps = [s for s in steps if s not in last] + last
        self._check_tensors()

    def described(self) -> str:
        """The filters on what leaves, in the order in which they run, for people."""
        return ", ".join(
            _shown(step.filter.settings()) + (" (site)" if step.host.from_policy else "") for step in self._steps
        )

    def agree(self, state: Arrays, *, weights: bool = True) -> None:
        """The tensors that this run exchanges, and this site's values of them. weights=False: they are no weights,
        so that only what travels beside them can be filtered."""
        self._agreed, self._weights = layout_of(state), weights
        self._check_tensors()
        encrypted = next((s.filter for s in self._steps if isinstance(s.filter, HomomorphicCKKS)), None)
        if encrypted is not None:
            encrypted.check_tensors(self._agreed)
            self._cipher, self._key = site_cipher(encrypted, self._host)
        self._keep_own(state)

    def _check_tensors(self) -> None:
        """ConfigError where a filter cannot work on the tensors that were agreed on."""
        if not self._weights:
            for item in (*self._arriving, *self._held, *(step.filter for step in self._steps)):
                if not isinstance(item, FactsFilter):
                    raise refuse(
                        f"{type(item).__name__} works on weights, which this adapter does not send", "leave it out"
                    )
        clash = [name for name in self._agreed if AUX in name]
        if clash and (self._arriving or encodings([step.filter for step in self._steps])):
            raise refuse(f"the name of tensor {clash[0]!r} has a {AUX!r}, which encodings use", "give it another name")

    @property
    def agreement(self) -> dict[str, str]:
        """What must be equal at all sites, beside the settings of the job. After `agree`."""
        return {"ckks_key": self._key} if self._cipher else {}

    @property
    def encrypts(self) -> bool:
        """Whether the server cannot read the model. After `agree`."""
        return self._cipher is not None

    def held_back(self, arrays: Arrays) -> Arrays:
        """Of this site's `arrays`, those that it goes on with in place of the global model's. Borrowed."""
        return {n: a for n, a in arrays.items() if any(item.excludes(n) for item in self._held)}

    def restore(self, held_back: Arrays) -> None:
        """Go on with what `held_back` gave in another process of this site. After `agree`."""
        self._keep_own(held_back)

    # -- what arrives ----------------------------------------------------------------------------------------

    def received(self, task: Task) -> Task:
        """The task as the site's own code sees it."""
        arrays = task.arrays
        if self._cipher and is_encrypted(arrays):
            arrays = self._cipher.decrypt(arrays, self._agreed)
        if self._arriving and task.kind == "train":
            arrays = {n: np.asarray(a) for n, a in _decoded(self._arriving, arrays, self._agreed).items()}
        if self._kept and task.kind == "train":
            for name, mine in self._kept.items():
                arrays[name][...] = mine
        if task.kind == "train":
            for step in self._steps:
                if isinstance(step.opened, Budgeted):
                    step.opened.afford(task.round)
        task = replace(task, arrays=arrays)
        if self._on_differences and task.kind == "train":
            self._keep_base(task.arrays)
        return task

    def _keep_own(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if any(item.excludes(name) for item in self._held):
                self._kept[name] = np.array(array)

    def _keep_base(self, arrays: Arrays) -> None:
        """A copy of the global model: the site's own code may write to the arrays of its task."""
        for name, array in arrays.items():
            if name not in self._base:
                self._base[name] = np.empty(array.shape, array.dtype)
            self._base[name][...] = array

    @property
    def _on_differences(self) -> bool:
        return any(step.opened or encodings([step.filter]) for step in self._steps)

    # -- what leaves -----------------------------------------------------------------------------------------

    def outgoing(self, update: Update, task: Task) -> Update:
        """What leaves for `update`. UpdateRefusedError, or the error of a filter that does not let it pass."""
        self._keep_own(update.arrays)
        if update.extras:
            for step in self._steps:
                _refuse_extras(step.filter, update)
        ran: list[Settings] = list(applied_filters(update.encoding))  # what the adapter itself holds back
        base = replace(task, arrays=self._base)
        for step in self._steps:
            if isinstance(step.filter, FactsFilter):
                update = _with_facts(update, step)
            elif isinstance(step.filter, ExcludeVars):
                update = replace(update, arrays=step.filter.encode(update.arrays))
            elif step.opened:
                update = step.opened(self._difference(update), base)
            ran.append(_recorded(step))
        last = encodings([step.filter for step in self._steps])
        if self._cipher:
            update = self._encrypted(update)
        elif last:
            update = self._encoded(self._difference(update), last)
        elif update.content == "delta":
            narrow = {n: a.astype(self._agreed[n][0], copy=False) for n, a in update.arrays.items()}
            update = replace(update, arrays=narrow)
        if not ran or (
            update.content == "encoded" and not last and not self._cipher
        ):  # an adapter's own encoding has its own name
            return update
        return replace(update, encoding=json.dumps(ran))

    def initial(self, update: Update) -> Update:
        """What leaves where this site's own weights begin the run: these as they are, or encrypted."""
        if not self._cipher:
            return update
        ran = [step.filter.settings() for step in self._steps if isinstance(step.filter, HomomorphicCKKS)]
        return replace(self._encrypted(update), encoding=json.dumps(ran))

    def report(self, report: Report) -> Report:
        """What leaves for a score."""
        for step in self._steps:
            if isinstance(step.filter, FactsFilter):
                report = _with_facts(report, step)
        return report

    def _difference(self, update: Update) -> Update:
        """The update as differences to the global model, in buffers of our own; integers as they are."""
        if update.content == "delta":
            return update
        found: dict[str, Array] = {}
        for name, array in update.arrays.items():
            dtype = work_dtype(self._agreed[name][0])
            out = self._work.get(name)
            if out is None:
                out = self._work[name] = np.empty(array.shape, dtype)
            if is_floating(dtype):
                np.subtract(array, self._base[name], out=out, dtype=dtype, casting="unsafe")
            else:
                out[...] = array
            found[name] = out
        return replace(update, arrays=found, content="delta")

    def _encrypted(self, update: Update) -> Update:
        assert self._cipher is not None
        arrays = update.arrays
        if update.content == "delta":
            arrays = LazyArrays(arrays, lambda name: np.add(self._base[name], update.arrays[name], dtype=np.float64))
        return replace(update, arrays=self._cipher.encrypt(arrays, self._agreed), content="encoded")

    def _encoded(self, update: Update, chain: list[EncodingFilter]) -> Update:
        wanted = work_layout({name: self._agreed[name] for name in update.arrays})
        remembers = any(getattr(item, "error_feedback", False) for item in chain)
        if remembers:
            self._feedback.add_to(update.arrays, update.round)
        arrays = update.arrays
        for item in chain:
            arrays = item.encode(arrays)
        if remembers:
            self._feedback.remember(update.arrays, _decoded(chain, arrays, wanted), update.round)
        return replace(update, arrays=arrays, content="encoded")


def _decoded(chain: Sequence[EncodingFilter], arrays: Arrays, layout: Layout) -> Arrays:
    layouts = [layout]
    for item in chain[:-1]:
        layouts.append(item.layout(layouts[-1]))
    for item, before in zip(reversed(chain), reversed(layouts), strict=True):
        arrays = item.decode(arrays, before)
    return arrays


def _opened(item: Any, host: FilterHost) -> _Step:
    return _Step(item, host, item.open(host) if hasattr(item, "open") else None)


def _with_facts(sent: F, step: _Step) -> F:
    steps, round = (sent.local_steps, sent.round) if isinstance(sent, Update) else (0, sent.version)
    facts = step.filter.facts(Facts(sent.metrics, sent.num_examples, steps, round), step.host)
    changed = {"metrics": facts.metrics, "num_examples": facts.num_examples}
    if isinstance(sent, Update):
        changed["local_steps"] = facts.local_steps
    return replace(sent, **changed)


def _recorded(step: _Step) -> Settings:
    done = dict(step.opened.record) if step.opened else {}
    return {**step.filter.settings(), **done, **({"site": True} if step.host.from_policy else {})}


def _refuse_extras(item: Any, update: Update) -> None:
    try:
        check_extras(item)
    except ConfigError as error:
        raise UpdateRefusedError(
            error.what, where=f"update of {update.site}, round {update.round}", fix=error.fix
        ) from None


def _shown(settings: Settings) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "name")
    return f"{settings['name']}({arguments})"
