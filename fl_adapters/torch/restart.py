"""Exact restarts of torch trainers: the parts of a training's state, as plain values and arrays, and its random states.

State goes into the very objects that are there, bit for bit: `load_state_dict` of an optimizer would cast moments to
the dtype of their parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import seed_python
from fl_adapters.participant.state_file import State
from fl_adapters.torch import ranks
from fl_adapters.torch.correction import plain
from fl_adapters.torch.state import as_array, as_tensor, is_sharded, unwrap
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_TENSOR, _DEVICE = "torch.Tensor", "device"


def packed(value: Any) -> State:
    """`value` with arrays in place of its tensors: views of those on the host, so borrowed until they change."""
    if isinstance(value, Tensor):
        return {_TENSOR: as_array(value.detach().cpu().contiguous()), _DEVICE: str(value.device)}
    if isinstance(value, Mapping):
        return {key: packed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(packed(item) for item in value) if type(value) in (list, tuple) else [*map(packed, value)]
    return value


def unpacked(state: State) -> Any:
    """What `packed` was given, tensors on their devices."""
    if isinstance(state, dict):
        if _TENSOR in state:
            return as_tensor(state[_TENSOR]).to(state[_DEVICE])
        return {key: unpacked(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(unpacked(item) for item in state)
    return state


def packed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Arrays by name: views of tensors on the host, so borrowed until they change."""
    return {name: as_array(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> None:
    """Copy `arrays` into live `tensors`, of which there may be more. ConfigError where they are of another model."""
    fits = {n: n in tensors and tuple(tensors[n].shape) == array.shape for n, array in arrays.items()}
    if not all(fits.values()):
        raise ConfigError(
            "what this site kept before its restart is of another model",
            where=", ".join([name for name, same in fits.items() if not same][:4]),
            fix="start the site again with the same script",
        )
    for name, array in arrays.items():
        tensors[name].copy_(as_tensor(array))


def packed_optimizer(optimizer: Any, states: Mapping[Any, Any] | None = None) -> State:
    """Groups and state, by the order of the parameters. states: of other weights than those in the module."""
    own = plain(optimizer)
    states = own.state if states is None else states
    groups = [{key: packed(value) for key, value in g.items() if key != "params"} for g in own.param_groups]
    return [groups, [[packed(states[p]) if p in states else None for p in g["params"]] for g in own.param_groups]]


def load_optimizer(optimizer: Any, state: State) -> None:
    """Set what `packed_optimizer` gave, in a process that comes back."""
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
    """Parameter -> state, of the second part of `packed_optimizer`."""
    return {
        parameter: unpacked(value)
        for group, part in zip(plain(optimizer).param_groups, states, strict=True)
        for parameter, value in zip(group["params"], part, strict=True)
        if value is not None
    }


def local_tensors(module: nn.Module, travelling: Sequence[Tensor]) -> dict[str, Tensor]:
    """What training may change now and that does not travel: trained parameters, and buffers, also those that the
    model's own state_dict leaves out."""
    travels = {id(tensor) for tensor in travelling}
    return {
        name: tensor
        for name, tensor in all_tensors(module).items()
        if id(tensor) not in travels and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every live parameter and buffer by its own name."""
    module = unwrap(module)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def refuse_inexact(module: nn.Module, loader: Any) -> None:
    """Raise ConfigError for what `exact_restart` cannot keep. loader: the training data's DataLoader, or what stands
    for it."""
    if ranks.several():
        raise refused("several processes for one site are not kept yet", "train with one process at each site")
    if any(is_sharded(parameter) for parameter in module.parameters()):
        raise refused("a sharded model is not kept yet", "train with one process at each site")
    if getattr(loader, "persistent_workers", False):
        raise refused(
            "the random states of data loader workers that live on are out of reach",
            "set persistent_workers=False: workers that begin anew with each epoch are seeded",
        )


def refuse_parts(every: Every, framework: str, resumed: str | None, fix: str) -> None:
    """Raise ConfigError for rounds that end within an epoch of `framework`, and for a trainer that has begun already:
    `resumed` says by what and where, `fix` what to leave out."""
    if every.epochs is None:
        raise refused(
            f"{framework} begins an epoch's data at its beginning only, and with a budget in steps rounds end within "
            "epochs",
            'count the round in epochs: every="epoch"',
        )
    if resumed:
        raise ConfigError("exact_restart brings the trainer back by itself", where=resumed, fix=fix)


def refused(reason: str, fix: str) -> ConfigError:
    return ConfigError(f"exact_restart cannot be kept here: {reason}", where="the trainer", fix=fix)


def seed_round(seed: int, loader: Any = None) -> None:
    """All random states that a round draws from: those of Python, NumPy and torch, on every device, and the generators
    that the training data's loader and samplers have of their own."""
    seed_python(seed)
    torch.manual_seed(seed)
    for part in samplers_of(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def samplers_of(loader: Any) -> list[Any]:
    """A data loader and all samplers within it, each once."""
    found: list[Any] = []
    left = [loader]
    while left:
        part = left.pop()
        if part is None or any(part is other for other in found):
            continue
        found.append(part)
        left += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return found
