"""Filters at a site: decode and filter the global model that arrives, filter and encode updates that leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    matches,
    refuse,
    work_dtype,
    work_layout,
)
from fl_runtime.filters.ckks import Cipher, HomomorphicCKKS, is_encrypted
from fl_runtime.filters.ckks_key import site_cipher
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.filters.facts import AllowMetrics, Examples
from fl_runtime.filters.feedback import HELD_VERSION, ErrorFeedback, HeldModel, decode_chain
from fl_runtime.filters.gaussian import GaussianDP
from fl_runtime.filters.ledger import BudgetLimit
from fl_runtime.filters.server import applied_filters
from fl_runtime.filters.svt import SVTPrivacy
from fl_runtime.types import Array, Arrays, Report, Settings, Strategy, Task, Update, is_floating
from fl_runtime.types.tensor_names import STATISTICS, is_statistic

F = TypeVar("F", Update, Report)


@dataclass(frozen=True)
class _OutgoingFilter:
    """A filter at `site_out`, and the host it runs at. `running` is its state, if it is a value filter."""

    filter: Any
    host: FilterHost
    running: RunningFilter | None = None


@dataclass(frozen=True)
class _Agreed:
    """What the run exchanges, see `SiteFilters.agree`."""

    layout: Layout = field(default_factory=dict)
    weights: bool = True
    strategy: Strategy | None = None
    extras: bool = False
    differences: bool = False


class SiteFilters:
    """All filters of one site in one run, with their state. Only one thread may use it at a time.

    It does not write to the arrays of an update: filters work on buffers of this object, which are valid until the next
    update.

    Args:
        job: Settings of the job's filters, for all points.
        policy_filters: Settings of the filters in the site's policy, for `site_out`.
        host: The site.

    Raises:
        ConfigError: If the filters cannot be made or do not work together.
    """

    def __init__(self, job: Sequence[Settings], policy_filters: Sequence[Settings], host: FilterHost) -> None:
        check_filters(job)
        self._job, self._host = job, host
        self._global = HeldModel(encodings(at_point(job, "server_out")))
        self._excluding = [item for item in at_point(job, "site_in") if isinstance(item, ExcludeVars)]
        self._agreed = _Agreed()
        self._own_values: dict[str, Array] = {}  # own values of the tensors whose arriving values are ignored
        self._base: dict[str, Array] = {}
        self._work: dict[str, Array] = {}
        self._feedback = ErrorFeedback(host)
        self._outgoing: list[_OutgoingFilter] = []
        self._cipher: Cipher | None = None
        self._key = ""
        self._statistics: ExcludeVars | None = None  # holds back running statistics, which noise would spoil
        self.set_policy_filters(policy_filters, host.budget)

    def set_policy_filters(self, policy_filters: Sequence[Settings], budget: BudgetLimit | None = None) -> None:
        """Replace the filters of the site's policy. They take effect with the next update.

        Args:
            policy_filters: Settings of the policy's filters.
            budget: Upper limit of the site for the privacy cost of all filters together; None for no limit.

        Raises:
            ConfigError: If the filters cannot be made or do not work together with the job's.
        """
        check_filters(policy_filters)
        misplaced = [settings for settings in policy_filters if settings.get("at", "site_out") != "site_out"]
        if misplaced:
            raise refuse(
                f"the policy has the filter {misplaced[0]['name']} at {misplaced[0]['at']}",
                "leave `at` out: a policy's filters run at site_out",
            )
        # filters that did not change keep their state
        previous = {(step.filter, step.host): step for step in self._outgoing}
        steps = [
            previous.get((item, host := replace(self._host, from_policy=policy, budget=budget))) or _opened(item, host)
            for policy, filters in ((False, self._job), (True, policy_filters))
            for item in at_point(filters, "site_out")
        ]
        # encodings and encryption run after the filters that change values
        last = [s for s in steps if encodings([s.filter]) or isinstance(s.filter, HomomorphicCKKS)]
        self._outgoing = [s for s in steps if s not in last] + last
        self._check_together()
        if any(step.host.from_policy and isinstance(step.filter, HomomorphicCKKS) for step in steps):
            raise refuse("HomomorphicCKKS cannot be in a policy, since all sites must use it", "ask for it in the job")
        self._check_tensors()

    def described(self) -> str:
        """Return the filters at `site_out` as readable text, in the order in which they run."""
        return ", ".join(
            _as_text(step.filter.settings()) + (" (site)" if step.host.from_policy else "") for step in self._outgoing
        )

    def agree(
        self,
        state: Arrays,
        *,
        weights: bool = True,
        strategy: Strategy | None = None,
        extras: bool = False,
        differences: bool = False,
    ) -> None:
        """Set the tensors that this run exchanges. Called before the handshake.

        Args:
            state: This site's values of the tensors; copied where they are needed.
            weights: Whether the tensors are weights. If not, only metrics and numbers of examples can be filtered.
            strategy: The run's strategy; None if it is not known.
            extras: Whether arrays travel beside the tensors, such as optimizer moments or control variates.
            differences: Whether weights leave as differences to the global model that the site trained from, since an
                update may count in a later round (`late: carry`).

        Raises:
            ConfigError: If a filter cannot work on these tensors, or with this strategy.
        """
        self._agreed = _Agreed(layout_of(state), weights, strategy, extras, differences and weights)
        self._check_together()
        self._check_tensors()
        encrypted = next((s.filter for s in self._outgoing if isinstance(s.filter, HomomorphicCKKS)), None)
        if encrypted is not None:
            encrypted.check_tensors(self._agreed.layout)
            self._cipher, self._key = site_cipher(encrypted, self._host)
        self._save_own_values(state)

    def _check_together(self) -> None:
        """Raise ConfigError if the filters of job and policy do not work together, or with the strategy."""
        at_server = [settings for settings in self._job if settings.get("at") in ("server_in", "server_out")]
        own = [step.filter.settings() for step in self._outgoing]
        check_filters([*own, *at_server])
        strategy = self._agreed.strategy
        if strategy is None or not self._agreed.weights:
            return
        check_filters(own, "average" if self._agreed.extras else None, strategy)
        if not strategy.partial and any(
            isinstance(s.filter, ExcludeVars) and s.host.from_policy for s in self._outgoing
        ):
            raise refuse(
                f"ExcludeVars in this site's policy holds back tensors that other sites send, but {strategy.spec} "
                "compares whole updates",
                "use another strategy, or keep_local in the job so that all sites hold back the same tensors",
            )

    def _check_tensors(self) -> None:
        """Raise ConfigError if a filter cannot work on the agreed tensors."""
        if not self._agreed.weights:
            for item in (*self._global.chain, *self._excluding, *(step.filter for step in self._outgoing)):
                if not isinstance(item, FactsFilter):
                    raise refuse(
                        f"{type(item).__name__} works on weights, but this adapter does not send weights",
                        "leave the filter out",
                    )
        self._statistics = ExcludeVars(STATISTICS) if self._adds_noise and self.statistics else None
        if self._statistics and any(isinstance(step.filter, HomomorphicCKKS) for step in self._outgoing):
            raise refuse(
                f"noise would spoil the running statistics of the model, such as {self.statistics[0]}, and with "
                "HomomorphicCKKS no tensor can be held back",
                f"keep_local: {list(STATISTICS)}, or use layers without such statistics (GroupNorm)",
            )
        clash = [name for name in self._agreed.layout if AUX in name]
        if clash and (self._global.chain or encodings([step.filter for step in self._outgoing])):
            raise refuse(f"the name of tensor {clash[0]!r} contains {AUX!r}, which encodings use", "rename the tensor")

    @property
    def _adds_noise(self) -> bool:
        """Whether a filter adds noise to what this site sends, here or at the server."""
        central = at_point(self._job, "server_in")
        return any(
            isinstance(item, (GaussianDP, SVTPrivacy)) for item in (*central, *(s.filter for s in self._outgoing))
        )

    @property
    def statistics(self) -> list[str]:
        """Names of the running statistics of normalization layers among the tensors that were agreed on."""
        return [name for name, (dtype, _) in self._agreed.layout.items() if is_statistic(name) and is_floating(dtype)]

    @property
    def held_back(self) -> list[str]:
        """Names of the running statistics that stay at this site, since a filter adds noise. Call after `agree`."""
        return self.statistics if self._statistics else []

    @property
    def agreement(self) -> dict[str, str]:
        """Values that must be equal at all sites, besides the job's settings. Call after `agree`."""
        return {"ckks_key": self._key} if self._cipher else {}

    @property
    def encrypts(self) -> bool:
        """Whether the model is encrypted for the server; known after `agree`."""
        return self._cipher is not None

    def own_values(self, arrays: Arrays) -> Arrays:
        """Return this site's arrays that it keeps instead of the arriving ones (`ExcludeVars` at `site_in`).

        Args:
            arrays: This site's arrays.

        Returns:
            The selected arrays, not copied.
        """
        return {name: array for name, array in arrays.items() if self._keeps(name)}

    def _keeps(self, name: str) -> bool:
        """Whether this site continues with its own values of a tensor."""
        ignored = [*self._excluding, *([self._statistics] if self._statistics else [])]
        return any(item.excludes(name) for item in ignored)

    def restore(self, own_values: Arrays) -> None:
        """Restore the arrays that an earlier process of this site got from `own_values`. Call after `agree`."""
        self._save_own_values(own_values)

    # -- arriving --------------------------------------------------------------------------------------------

    def received(self, task: Task) -> Task:
        """Decode and filter a task.

        Args:
            task: The task as it arrived. Filters at `site_in` may write to its arrays.

        Returns:
            The task as the site's code sees it.

        Raises:
            PrivacyBudgetError: If the budget does not allow this round's update. Checked now, so that the round is not
                trained in vain.
        """
        arrays = task.arrays
        if self._cipher and is_encrypted(arrays):
            arrays = self._cipher.decrypt(arrays, self._agreed.layout)
        if self._global.chain and task.kind == "train":
            arrays = self._global.receive(task)
            task = replace(task, config={name: value for name, value in task.config.items() if name != HELD_VERSION})
        for name, value in self._own_values.items():
            # at its end, too, a site goes on with its own statistics: the global model has none
            if name in arrays and (task.kind == "train" or (self._statistics and self._statistics.excludes(name))):
                arrays[name][...] = value
        if task.kind == "train":
            for step in self._outgoing:
                if isinstance(step.running, Budgeted):
                    step.running.afford(task.round)
        task = replace(task, arrays=arrays)
        if self._needs_base and task.kind == "train":
            self._save_base(task.arrays)
        return task

    def _save_own_values(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if self._keeps(name):
                self._own_values[name] = np.array(array)

    def _save_base(self, arrays: Arrays) -> None:
        """Copy the global model, since the site's code may write to the arrays of its task."""
        for name, array in arrays.items():
            if name not in self._base:
                self._base[name] = np.empty(array.shape, array.dtype)
            self._base[name][...] = array

    @property
    def _needs_base(self) -> bool:
        return self._agreed.differences or any(s.running or encodings([s.filter]) for s in self._outgoing)

    # -- leaving ---------------------------------------------------------------------------------------------

    def outgoing(self, update: Update, task: Task) -> Update:
        """Filter and encode an update.

        Args:
            update: The site's update; not changed.
            task: The task that it answers.

        Returns:
            The update that leaves. Its arrays are valid until the next call.

        Raises:
            UpdateRefusedError: If it has extras that a filter does not cover, or a filter refuses it.
            PrivacyBudgetError: If it would exceed a privacy budget.
        """
        self._save_own_values(update.arrays)
        if update.extras:
            for step in self._outgoing:
                _refuse_extras(step.filter, update)
        # first the filters that the adapter itself applied (Session.submit(held_back=))
        ran: list[Settings] = list(applied_filters(update.encoding))
        filter_task = replace(task, arrays=self._base)
        if self._statistics:
            update = replace(update, arrays=self._statistics.encode(update.arrays))
            ran.append(self._statistics.settings())
        for step in self._outgoing:
            if isinstance(step.filter, FactsFilter):
                update = _with_facts(update, step)
            elif isinstance(step.filter, ExcludeVars):
                update = replace(update, arrays=step.filter.encode(update.arrays))
            elif step.running:
                update = step.running(self._difference(update), filter_task)
            ran.append(_record(step))
        last = encodings([step.filter for step in self._outgoing])
        if self._agreed.differences and update.content == "weights":
            update = self._difference(update)
        if self._cipher:
            update = self._encrypted(update)
        elif last:
            update = self._encoded(self._difference(update), last)
        elif update.content == "delta":
            narrow = {n: a.astype(self._agreed.layout[n][0], copy=False) for n, a in update.arrays.items()}
            update = replace(update, arrays=narrow)
            if self._host.sharing:  # a secure sum adds weights
                update = self._weights(update)
        encoded_by_adapter = update.content == "encoded" and not last and not self._cipher
        if not ran or encoded_by_adapter:  # an adapter's own encoding (trees, LoRA factors) stays in `encoding`
            return update
        return replace(update, encoding=json.dumps(ran))

    def initial(self, update: Update) -> Update:
        """Encrypt this site's weights for use as the initial model; without encryption they leave unchanged.

        Args:
            update: The site's weights.

        Returns:
            The update that leaves.
        """
        if not self._cipher:
            return update
        ran = [step.filter.settings() for step in self._outgoing if isinstance(step.filter, HomomorphicCKKS)]
        return replace(self._encrypted(update), encoding=json.dumps(ran))

    def withhold(self, metric: str) -> bool:
        """Return whether a metric does not leave this site, because no pattern of an `AllowMetrics` matches its name.

        Args:
            metric: Name of the metric.
        """
        allowed = [step.filter.names for step in self._outgoing if isinstance(step.filter, AllowMetrics)]
        return not all(matches(metric, names) for names in allowed)

    @property
    def hides_counts(self) -> bool:
        """Whether a filter hides the numbers of examples and of local steps."""
        return any(isinstance(step.filter, Examples) for step in self._outgoing)

    def report(self, report: Report) -> Report:
        """Filter the metrics of a global model.

        Args:
            report: The site's report.

        Returns:
            The report that leaves.

        Raises:
            PrivacyBudgetError: If it would exceed a privacy budget.
        """
        for step in self._outgoing:
            if isinstance(step.filter, FactsFilter):
                report = _with_facts(report, step)
        return report

    def _difference(self, update: Update) -> Update:
        """Return the update as differences to the global model, in buffers of this object; integers are copied."""
        if update.content == "delta":
            return update
        differences: dict[str, Array] = {}
        for name, array in update.arrays.items():
            dtype = work_dtype(self._agreed.layout[name][0])
            out = self._work.get(name)
            if out is None:
                out = self._work[name] = np.empty(array.shape, dtype)
            if is_floating(dtype):
                np.subtract(array, self._base[name], out=out, dtype=dtype, casting="unsafe")
            else:
                out[...] = array
            differences[name] = out
        return replace(update, arrays=differences, content="delta")

    def _weights(self, update: Update) -> Update:
        """Return an update of differences as weights; real tensors are computed in float64 at each access."""

        def whole(name: str) -> Array:
            array = update.arrays[name]
            return np.add(self._base[name], array, dtype=np.float64) if is_floating(array.dtype) else array

        return replace(update, arrays=LazyArrays(update.arrays, whole), content="weights")

    def _encrypted(self, update: Update) -> Update:
        assert self._cipher is not None
        weights = self._weights(update) if update.content == "delta" else update
        return replace(update, arrays=self._cipher.encrypt(weights.arrays, self._agreed.layout), content="encoded")

    def _encoded(self, update: Update, chain: list[EncodingFilter]) -> Update:
        layout = work_layout({name: self._agreed.layout[name] for name in update.arrays})
        with_feedback = any(getattr(item, "error_feedback", False) for item in chain)
        if with_feedback:
            self._feedback.add_to(update.arrays, update.round)
        arrays = update.arrays
        for item in chain:
            arrays = item.encode(arrays)
        if with_feedback:
            self._feedback.remember(update.arrays, decode_chain(chain, arrays, layout), update.round)
        return replace(update, arrays=arrays, content="encoded")


def _opened(item: Any, host: FilterHost) -> _OutgoingFilter:
    return _OutgoingFilter(item, host, item.open(host) if hasattr(item, "open") else None)


def _with_facts(message: F, step: _OutgoingFilter) -> F:
    local_steps, round = (message.local_steps, message.round) if isinstance(message, Update) else (0, message.version)
    facts = step.filter.facts(Facts(message.metrics, message.num_examples, local_steps, round), step.host)
    changed = {"metrics": facts.metrics, "num_examples": facts.num_examples}
    if isinstance(message, Update):
        changed["local_steps"] = facts.local_steps
    return replace(message, **changed)


def _record(step: _OutgoingFilter) -> Settings:
    record = dict(step.running.record) if step.running else {}
    return {**step.filter.settings(), **record, **({"site": True} if step.host.from_policy else {})}


def _refuse_extras(item: Any, update: Update) -> None:
    try:
        check_extras(item)
    except ConfigError as error:
        raise UpdateRefusedError(
            error.what, where=f"update of {update.site}, round {update.round}", fix=error.fix
        ) from None


def _as_text(settings: Settings) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "name")
    return f"{settings['name']}({arguments})"
