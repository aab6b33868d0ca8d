"""Exact restarts of torch trainers: a training's state as plain values and arrays, and the seeds of its random states.

State is loaded into the objects that exist, bit for bit. An optimizer's own `load_state_dict` is not used: it would
cast moments to the dtype of their parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.options import Every, SiteSettings
from fl_adapters.participant.restart import (
    WHOLE_ROUND,
    not_restartable,
    part_seed,
    require_whole_epochs,
    seed_python,
)
from fl_adapters.participant.state_file import State
from fl_adapters.torch.local_work.correction import plain
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.ranks.shards import is_sharded
from fl_adapters.torch.selection import unwrap
from fl_adapters.torch.state import as_array, as_tensor
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_TENSOR, _DEVICE = "torch.Tensor", "device"


@dataclass(frozen=True)
class WithinRound:
    """Where a training stood when a point was saved in the middle of a round.

    Attributes:
        progress: The fields of `Progress`.
        weights: The weights that travel, in training: name -> array.
        tally: What `Tally.state_dict` returned.
    """

    progress: Mapping[str, Any]
    weights: Mapping[str, Array]
    tally: Mapping[str, Any]


class Stateful(Protocol):
    """Whatever gives its state and takes it back: a schedule, a gradient scaler, a live model."""

    def state_dict(self) -> Any:
        """Return the state to save.

        Returns:
            The state, which may hold references to live tensors.
        """
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned, maybe in another process.

        Returns:
            Nothing that is used.
        """
        ...


@dataclass
class TorchSnapshot:
    """State of one training that outlives a round and does not travel. Implements `fl_adapters.adapter.Snapshot`.

    Attributes:
        live: The live model, with its local tensors and its optimizers.
        stateful: Other objects with a state, by names that the next process gives them too: schedules, scalers.
        own: Position of the trainer, and whatever else its adapter saves.
        restart_cost: What a restart repeats, as a clause for the user.
        loads_again: Whether the adapter calls `load_again`. A point within a round is kept in memory until then.
        loaded: Whether the state of an earlier process, which had trained, was loaded.
        within: Where the loaded state stands within a round; None for a state between two rounds.
    """

    live: Stateful
    stateful: Mapping[str, Any]
    own: Snapshot
    restart_cost: str = WHOLE_ROUND
    loads_again: bool = False
    loaded: bool = False
    within: WithinRound | None = None
    _point: State = field(default=None, init=False, repr=False)

    def save(self) -> State:
        """State between two rounds, with views of live tensors: borrowed until the training goes on."""
        parts = {name: packed(part.state_dict()) for name, part in self.stateful.items()}
        return {"live": self.live.state_dict(), "stateful": parts, "own": packed(self.own.save())}

    def save_within(self, weights: Mapping[str, Tensor], progress: Mapping[str, Any], tally: Any) -> State:
        """State in the middle of a round, with views of live tensors.

        Args:
            weights: The tensors that travel, by name.
            progress: The fields of `Progress`.
            tally: What `Tally.state_dict` returned.
        """
        within = {"progress": dict(progress), "weights": packed_tensors(weights), "tally": packed(tally)}
        return {**self.save(), "within": within}

    def load(self, state: State) -> None:
        """Go on from a state that `save` gave in an earlier process of this site.

        Args:
            state: The saved state.

        Raises:
            ConfigError: If the state is of a training with other parts.
        """
        if state["stateful"].keys() != self.stateful.keys():
            raise ConfigError(
                f"this training saves {', '.join(self.stateful) or 'nothing'} beside its optimizers, but the process "
                f"before saved {', '.join(state['stateful']) or 'nothing'}",
                where="the saved state of this site",
                fix="start the site again with the same script",
            )
        self._load(state)
        self.loaded = True
        if (within := state.get("within")) is not None:
            self._point = state if self.loads_again else None
            tally = unpacked(within.get("tally", {}))  # absent in points of earlier versions
            self.within = WithinRound(within["progress"], within["weights"], tally)

    def load_again(self) -> None:
        """Load the state once more, and let go of it. Hooks of a trainer that begins may have changed what was set."""
        if self._point is not None:
            self._load(self._point)
        self._point = None

    def _load(self, state: State) -> None:
        self.live.load_state_dict(state["live"])
        for name, part in self.stateful.items():
            part.load_state_dict(unpacked(state["stateful"][name]))
        self.own.load(unpacked(state["own"]))


def packed(value: Any) -> State:
    """Replace the tensors in `value` by arrays. Those of host tensors are views, borrowed until the tensors change."""
    if isinstance(value, Tensor):
        return {_TENSOR: as_array(value.detach().cpu().contiguous()), _DEVICE: str(value.device)}
    if isinstance(value, Mapping):
        return {key: packed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(packed(item) for item in value) if type(value) in (list, tuple) else [*map(packed, value)]
    return value


def unpacked(state: State) -> Any:
    """Reverse `packed`: tensors are on their devices again."""
    if isinstance(state, dict):
        if _TENSOR in state:
            return as_tensor(state[_TENSOR]).to(state[_DEVICE])
        return {key: unpacked(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(unpacked(item) for item in state)
    return state


def packed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Convert tensors to arrays. Those of host tensors are views, borrowed until the tensors change."""
    return {name: as_array(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> None:
    """Copy `arrays` into the live tensors of the same names. Raises ConfigError for those of another model."""
    fits = {n: n in tensors and tuple(tensors[n].shape) == array.shape for n, array in arrays.items()}
    if not all(fits.values()):
        raise ConfigError(
            "what this site saved before its restart is of another model",
            where=", ".join([name for name, same in fits.items() if not same][:4]),
            fix="start the site again with the same script",
        )
    for name, array in arrays.items():
        tensors[name].copy_(as_tensor(array))


def packed_optimizer(optimizer: Any, states: Mapping[Any, Any] | None = None) -> State:
    """Groups and states of an optimizer, in the order of its parameters.

    `states` are used in place of the optimizer's own: those of a personal model that is not in the module now.
    """
    own = plain(optimizer)
    states = own.state if states is None else states
    groups = [{key: packed(value) for key, value in g.items() if key != "params"} for g in own.param_groups]
    return [groups, [[packed(states[p]) if p in states else None for p in g["params"]] for g in own.param_groups]]


def load_optimizer(optimizer: Any, state: State) -> None:
    """Set what `packed_optimizer` gave in an earlier process."""
    own, (groups, states) = plain(optimizer), state
    if [len(g["params"]) for g in own.param_groups] != [len(part) for part in states]:
        raise ConfigError(
            "the optimizer has other parameters than that of the process before",
            where=type(own).__name__,
            fix="start the site again with the same script",
        )
    own.state.clear()
    own.state.update(states_of(own, states))
    for group, values in zip(own.param_groups, groups, strict=True):
        group.update(unpacked(values))


def states_of(optimizer: Any, states: State) -> dict[Any, Any]:
    """State by parameter, from the second part of what `packed_optimizer` gives."""
    return {
        parameter: unpacked(value)
        for group, part in zip(plain(optimizer).param_groups, states, strict=True)
        for parameter, value in zip(group["params"], part, strict=True)
        if value is not None
    }


def local_tensors(tensors: Mapping[str, Tensor], travelling: Sequence[Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that training may change and that do not travel: trained parameters, and all buffers."""
    travels = {id(tensor) for tensor in travelling}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if id(tensor) not in travels and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every live parameter and buffer, those that its own state_dict leaves out included, by its name there."""
    module = unwrap(module)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def refuse_inexact(module: nn.Module, loader: Any) -> None:
    """Raise ConfigError for a model or a training DataLoader that `exact_restart` does not support."""
    if ranks.several():
        raise not_restartable(
            "several processes for one site are not supported yet", "train with one process at each site"
        )
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise not_restartable("a sharded model is not supported yet", "train with one process at each site")
    if getattr(loader, "persistent_workers", False):
        raise not_restartable(
            "the random states of persistent data loader workers cannot be set",
            "set persistent_workers=False: workers that start anew with each epoch are seeded",
        )


def refuse_parts(every: Every, framework: str, resumed: str | None, fix: str) -> None:
    """Raise ConfigError for rounds that end within an epoch, and for a trainer that resumed by itself.

    `resumed` names the checkpoint from which it resumed, if it did; `fix` says how to start without it.
    """
    require_whole_epochs(every, framework)
    if resumed:
        raise ConfigError("exact_restart brings the trainer back by itself", where=resumed, fix=fix)


def seed_round(seed: int, loader: Any = None) -> None:
    """Seed all random states that a round draws from.

    These are the global ones of Python, NumPy and torch, on every device, and the generators of the training data's
    loader and samplers.
    """
    seed_python(seed)
    torch.manual_seed(seed)
    for part in samplers_of(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


class SeededSampler:
    """The sampler of a training set, which seeds all random states before each batch is taken.

    What the data draw (an order, an augmentation, the masks of a language model) then depends on the number of the
    batch alone, and not on what training has drawn before. So batches that were trained can be skipped.

    Attributes:
        sampler: The sampler that decides the order.
        seed: Seed of the epoch; None seeds nothing.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler, self._batch_size = sampler, batch_size
        self.seed: int | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.seed is not None:
            seed_round(part_seed(self.seed, "order"))
        for position, row in enumerate(self.sampler):
            if self.seed is not None and position % self._batch_size == 0:
                seed_round(part_seed(self.seed, "batch", position // self._batch_size))
            yield row

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Pass the number of the epoch on to a sampler whose order depends on it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def seed_batches(loader: Any) -> SeededSampler | None:
    """Let the loader's own batch sampler take its rows from a `SeededSampler`.

    Args:
        loader: A training DataLoader, before its first epoch.

    Returns:
        The sampler, or None for a loader whose rows come in another way.
    """
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler:
        return None
    if not isinstance(batches.sampler, SeededSampler):
        batches.sampler = SeededSampler(batches.sampler, batches.batch_size)
    sampler: Any = batches.sampler
    return sampler if isinstance(sampler, SeededSampler) else None


class RoundData:
    """Data and random numbers of a round, so that a trainer can begin again at a checkpoint within it.

    All that a round draws follows from its seed and from a position: that of the epoch, the batch, or the step.

    Attributes:
        within: Whether there are restart points within a round.
        cost: What a restart repeats, as a clause for the user.
    """

    def __init__(self, loaders: Sequence[Any], settings: SiteSettings, cost: str, reason: str | None) -> None:
        """Let the training data draw by their position, if there are points within a round.

        Args:
            loaders: The training DataLoaders, before their first epoch.
            settings: Settings that hold at this site.
            cost: What a restart repeats, if there are points.
            reason: Why the trainer has no points within a round, or None if it has.
        """
        self._loaders = list(loaders)
        self._samplers: list[SeededSampler] = []
        if settings.plan.records_steps or settings.phases > 1:
            reason = "what the strategy records of a round, or a second model, is not saved within it"
        for loader in self._loaders if reason is None else ():
            if (sampler := seed_batches(loader)) is None:
                reason = f"{type(loader).__name__} takes its rows in a way that cannot be repeated from the middle"
                break
            self._samplers.append(sampler)
        self.within = reason is None
        self.cost = cost if reason is None else f"{WHOLE_ROUND}: {reason}"

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Seed an epoch of a round before its data begin.

        Args:
            seed: Seed of the round.
            epoch: Number of the epoch within the round, counted from 0.
        """
        if epoch and not self.within:
            return
        seed = part_seed(seed, "epoch", epoch) if epoch else seed
        for loader in self._loaders:
            seed_round(seed, loader)
        for number, sampler in enumerate(self._samplers):
            sampler.seed = part_seed(seed, "loader", number) if number else seed

    def begin_step(self, seed: int, *place: int) -> None:
        """Seed what the model draws in a step, if there are points within a round.

        Args:
            seed: Seed of the round.
            place: Number of the step within the round, or its epoch and its number there.
        """
        if self.within:
            seed_round(part_seed(seed, "step", *place))

    def end(self) -> None:
        """Seed nothing any more: the data loaders belong to the script again."""
        for sampler in self._samplers:
            sampler.seed = None


def samplers_of(loader: Any) -> list[Any]:
    """The data loader and all samplers within it, each once."""
    parts: list[Any] = []
    unvisited = [loader]
    while unvisited:
        part = unvisited.pop()
        if part is None or any(part is other for other in parts):
            continue
        parts.append(part)
        unvisited += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return parts
