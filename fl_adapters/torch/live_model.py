"""A live torch model and its optimizers, as the federation sees them on every rank of a site."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.exchange import matches
from fl_adapters.participant.local_work.dp_sgd import DPSGD
from fl_adapters.participant.local_work.local_work import LocalWork
from fl_adapters.participant.options import SiteSettings
from fl_adapters.participant.state_file import State
from fl_adapters.torch.handshake.agreement import agreement
from fl_adapters.torch.local_work.backend import TorchLocalBackend
from fl_adapters.torch.local_work.dp_sgd import Batches, PrivateTraining
from fl_adapters.torch.lora.factors import LoraFactors
from fl_adapters.torch.lora.strategy import LoraFreezing, lora_facts, lora_state
from fl_adapters.torch.optimizer_state import TorchOptimizerState
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.ranks.sharded_state import ShardedState, state_of
from fl_adapters.torch.ranks.shards import is_sharded, refuse_other_sharding, reshard, scatter
from fl_adapters.torch.restart import (
    all_tensors,
    load_optimizer,
    load_tensors,
    local_tensors,
    packed_optimizer,
    packed_tensors,
)
from fl_adapters.torch.selection import listed, tensors_beside, warn_of_unknown_parameters
from fl_adapters.torch.state import as_tensor
from fl_runtime.aggregation.corrections.local_terms import without_control
from fl_runtime.aggregation.lora.products import ENCODING
from fl_runtime.capabilities import GRADIENT_CORRECTION, LORA, OPTIMIZER_STATE, PERSONAL_MODEL
from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.types import Arrays, Content, Task
from fl_runtime.wire.names import Facts


class LiveModel:
    """Reads and sets the weights and optimizer moments of a model in training.

    It holds live tensors, so it belongs to one training and is never copied together with a callback. All methods are
    collective: every rank calls them, rank 0 with its task or arrays and the others with None.

    Args:
        model: The module that is trained, in its wrapper (DDP, FSDP2) if it has one.
        optimizers: All its optimizers.
        settings: Settings that hold at this site.
        others: Other modules that the optimizers may train, such as a loss with parameters, by name. What they train
            of them travels like a part of the model.
        initial_base: Whether a LoRA strategy that adds to the base weights gives them back their initial values at the
            end, and the adapter all that was learnt.

    Raises:
        ConfigError: If the model cannot travel, or the state of its optimizers cannot be averaged as `settings` ask.

    Attributes:
        state: The tensors that travel.
        local: Local-training changes required by the job's strategy.
        gradients: Gradient corrections, which the adapter connects with the trainer's optimizer steps.
        private: DP-SGD on this model; None without.
        sharded: Whether each rank holds only a part of some parameters, so that every rank must help to save the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        settings: SiteSettings,
        others: Mapping[str, nn.Module] | None = None,
        *,
        initial_base: bool = False,
    ) -> None:
        refuse_other_sharding(model)
        reshard(model)
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self._initial_base = initial_base
        self._model, self._optimizers, self._settings = model, list(optimizers), settings
        self._beside = tensors_beside(model, others or {}, optimizers)
        warn_of_unknown_parameters(model, optimizers, self._beside)
        self._frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        default_state = state_of(model, settings.exchange, settings.keep_local, self._beside)
        self._freezing = LoraFreezing(default_state.tensors)
        self.state = lora_state(model, default_state, settings, self._beside)
        self._final: Arrays | None = None
        self._final_local: dict[str, Tensor] = {}
        self._moments = [TorchOptimizerState(optimizer, self.state.tensors) for optimizer in optimizers]
        backend = TorchLocalBackend(model, optimizers, self.state, self._beside)
        self.gradients = backend.gradients
        self.local = LocalWork(backend, phases=settings.phases)
        self.private: PrivateTraining | None = None
        if settings.optimizer_state == "average":
            self._refuse_shared_parameters()
            for moments in self._moments:
                moments.refuse_if_not_averageable()

    def train_privately(self, dp_sgd: DPSGD, data: Any, host: FilterHost) -> None:
        """Train with DP-SGD from now on, until the corrections of gradients end.

        Args:
            dp_sgd: The script's settings.
            data: DataLoader of the training set.
            host: The site, with the folder of its ledger.

        Raises:
            ConfigError: If the model, the data or the job do not allow it.
        """
        settings = self._settings
        unsupported = "exact_restart" if settings.exact_restart else "a personal model" if settings.phases > 1 else ""
        if unsupported:
            raise ConfigError(
                f"the job asks for {unsupported}, which DP-SGD does not support",
                where="dp_sgd",
                fix="leave one of the two out",
            )
        self.private = PrivateTraining(dp_sgd, self._model, self._optimizers, Batches.of(data), settings.every, host)
        self.gradients.private = self.private

    @property
    def capabilities(self) -> frozenset[str]:
        """Capabilities that a strategy may require of this model."""
        lora = [LORA] if self._freezing.has_adapter else []
        return frozenset({OPTIMIZER_STATE, GRADIENT_CORRECTION, PERSONAL_MODEL, *lora})

    @property
    def _gathers(self) -> bool:
        """Whether every rank must help to read what travels."""
        return ranks.is_rank_zero() or isinstance(self.state, ShardedState)

    @property
    def cross_site(self) -> bool:
        """Whether every site's model is evaluated here after the last round."""
        return self._settings.cross_site

    @property
    def content(self) -> Content:
        """What an update of this model contains: full weights, or encoded arrays."""
        return "encoded" if self.encoding else "weights"

    @property
    def encoding(self) -> str:
        """Encoding of the arrays in an update; "" for plain weights."""
        return ENCODING if isinstance(self.state, LoraFactors) else ""

    @property
    def held_back(self) -> tuple[str, ...]:
        """Name patterns of agreed tensors that `arrays` leaves out, because they are frozen in this round."""
        return tuple(p for p in self._freezing.held_back if any(matches(name, [p]) for name in self.state.tensors))

    def agreement(self, framework: str) -> Facts:
        """Return the facts that must be equal at all sites.

        Args:
            framework: Name of the training framework.

        Returns:
            Fact -> value, on rank 0. Of no use on other ranks, and empty there unless the model is sharded.
        """
        if not (ranks.is_rank_zero() or self.sharded):
            return {}
        facts = agreement(
            self._model,
            framework=framework,
            exchange=self._settings.exchange,
            keep_local=self._settings.keep_local,
            beside=self._beside,
        )
        return lora_facts(facts, self._settings.plan, self._freezing.factors)

    def arrays(self) -> Arrays:
        """Return the weights that travel.

        Returns:
            Name -> host array, on rank 0; empty on the others. Borrowed until the next call.
        """
        if not self._gathers:
            return {}
        held_back = self.held_back
        return {name: array for name, array in self.state.get_state().items() if not matches(name, held_back)}

    def warn_of_unfrozen(self) -> None:
        """Warn, once, of parameters that were frozen when the run began, are trained now, and do not travel.

        Those that the settings keep at the site are left out.
        """
        travels = {id(tensor) for tensor in self.state.tensors.values()}
        local = self._settings.keep_local
        unfrozen = [
            name
            for name, parameter in self._all_tensors().items()
            if parameter.requires_grad and id(parameter) in self._frozen - travels and not matches(name, local)
        ]
        if unfrozen and isinstance(self._settings.exchange, str):
            self._frozen.clear()
            warnings.warn(
                "parameters that were frozen when the run began are trained now, but they do not travel, so they "
                f"differ from site to site: {listed(unfrozen)}. To exchange them, pass exchange='all' from the "
                "beginning, or unfreeze them before the run",
                stacklevel=3,
            )

    def moments(self) -> Arrays:
        """Return the optimizer moments that travel beside the weights.

        Returns:
            "<kind>/<parameter>" -> host array, on rank 0, owned by the caller. Empty on other ranks, and unless
            `optimizer_state` is "average".
        """
        average = self._settings.optimizer_state == "average"
        if not average or not self._gathers:
            return {}
        return {name: array for moments in self._moments for name, array in moments.get().items()}

    def apply_task_config(self, task: Task | None, *, over: bool) -> None:
        """Freeze what the settings of rank 0's task freeze. Call before `receive` or `resume`.

        Args:
            task: The task, on rank 0; None on the others.
            over: Whether the task holds the final weights, and no round follows.
        """
        self._freezing.begin(ranks.share(dict(task.config) if task else None), over=over)
        if isinstance(self.state, LoraFactors) and not over:
            specs, shared = ranks.share_arrays(task.arrays if task else None)
            self.state.check(specs)
            for name, array in shared:
                assert array is not None
                self.state.copy_in(name, array, base_alone=True)

    def receive(self, task: Task | None) -> None:
        """Begin the round of rank 0's task: set weights, apply the optimizer policy, prepare corrections.

        Args:
            task: The task, on rank 0; None on the others.
        """
        self.load(task.arrays if task else None)
        if self._settings.optimizer_state == "reset":
            for state in self._moments:
                state.reset()
        if self._settings.optimizer_state == "average":
            moments = {name: task.extras[name] for name in without_control(task.extras)} if task else None
            self._set_moments(moments)
        self.local.begin(task)

    def state_dict(self) -> State:
        """Return the state that outlives a round and does not travel, for exact restarts.

        Returns:
            Nested dicts and lists with views of live tensors. Borrowed until training continues.
        """
        return {
            "tensors": packed_tensors(self._local_tensors()),
            "optimizers": [packed_optimizer(optimizer) for optimizer in self._optimizers],
            "local": self.local.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from the state of an earlier process of this site. Call it before `receive`.

        Args:
            state: What `state_dict` returned there.
        """
        # among all tensors, since other parameters may have been frozen when the state was saved
        load_tensors(self._all_tensors(), state["tensors"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.local.load_state_dict(state["local"])

    def go_on(self, task: Task | None, weights: Arrays) -> None:
        """Continue in the middle of a round whose optimizer state is loaded already, for exact restarts.

        Args:
            task: The task, on rank 0; None on the others.
            weights: The weights that travel, as they were in training.
        """
        self.load(task.arrays if task else None)
        self.local.begin(task)
        load_tensors(self.state.tensors, weights)
        self.state.derive()

    def _local_tensors(self) -> dict[str, Tensor]:
        return local_tensors(self._all_tensors(), list(self.state.tensors.values()))

    def _all_tensors(self) -> dict[str, Tensor]:
        reshard(self._model)  # else it has full parameters in place of those that travel
        return {**all_tensors(self._model), **self._beside}

    def resume(self, task: Task | None) -> None:
        """Continue in the middle of the round of rank 0's task, with the weights and moments that the model has.

        Args:
            task: The task, on rank 0; None on the others.
        """
        self.local.begin(task, resumed=True)

    def load(self, arrays: Arrays | None) -> None:
        """Set weights on every rank, in place.

        Args:
            arrays: The weights, on rank 0; None on the others.

        Raises:
            StateMismatchError: If they do not fit the model. Nothing is changed then.
        """
        reshard(self._model)
        tensors = self.state.tensors
        specs, shared = ranks.share_arrays(arrays, lambda name, _: name in tensors and is_sharded(tensors[name]))
        self.state.check(specs)
        for name, array in shared:
            if is_sharded(tensors[name]):
                scatter(tensors[name], None if array is None else as_tensor(array))
            else:
                assert array is not None
                self.state.copy_in(name, array)
        self.state.derive()

    def receive_final(self, task: Task | None) -> None:
        """Set the final weights, and keep a copy of them for `restore_final`.

        Args:
            task: The final task, on rank 0; None on the others.
        """
        self.load(task.arrays if task else None)
        self.keep_final()

    def keep_final(self) -> None:
        """Keep a copy of the weights in the model for `restore_final`: those that travel, and those of this site."""
        self._final = self.state.snapshot_global()
        own = {name: tensor for name, tensor in self._local_tensors().items() if not is_sharded(tensor)}
        self._final_local = {name: tensor.detach().to("cpu", copy=True) for name, tensor in own.items()}

    @torch.no_grad()
    def restore_final(self) -> None:
        """Put the weights of `keep_final` back, on every rank, whatever has changed them since."""
        assert self._final is not None
        reshard(self._model)
        as_at_end = self._initial_base or isinstance(self.state, ShardedState)
        (self.state.restore_global if as_at_end else self.state.set_state)(self._final)
        tensors = self._all_tensors()
        for name, own in self._final_local.items():
            tensors[name].copy_(own)

    def _set_moments(self, arrays: Arrays | None) -> None:
        """Set rank 0's averaged moments on every rank, one at a time."""
        if not self._moments:
            return
        first, *others = self._moments
        by_parameter = {name: moments for moments in others for name in moments.names}

        def owner(moment: str) -> TorchOptimizerState:
            return by_parameter.get(moment.partition("/")[2], first)  # it refuses moments that belong to no optimizer

        specs, shared = ranks.share_arrays(arrays, lambda name, shape: owner(name).is_sharded(name, shape))
        for moments in self._moments if specs else ():
            moments.check({name: spec for name, spec in specs.items() if owner(name) is moments})
        for name, array in shared:
            owner(name).copy_in(name, array)

    def _refuse_shared_parameters(self) -> None:
        seen = set[str]()
        for moments in self._moments:
            if shared := seen & moments.names:
                raise ConfigError(
                    "two optimizers train this parameter, so optimizer_state='average' cannot tell their moments apart",
                    where=sorted(shared)[0],
                    fix="use optimizer_state='keep' or 'reset', or let each optimizer train its own parameters",
                )
            seen |= moments.names
