"""Which tensors of a live torch model travel, and under which names.

Of a PEFT model the active adapter travels, under the names that its tensors have in `adapter_model.safetensors`. What
the optimizers train beside the model travels too, such as the classifier of a loss.

Two kinds of tensors never travel: those of PEFT adapters that are not active, and the singular vectors of spectral
normalisation, which each site computes from the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.exchange import matches, selected
from fl_adapters.participant.options import Exchange
from fl_adapters.torch.ranks.shards import refuse_unknown_shards
from fl_adapters.torch.spectral_norm import spectral_layers
from fl_runtime.errors import ConfigError
from fl_runtime.wire.dtypes import DTYPES

_LISTED = 4


def listed(names: Sequence[str]) -> str:
    """Return the first names for a message.

    Args:
        names: Any number of names.

    Returns:
        At most four of them, separated by commas, and "..." if there are more.
    """
    return ", ".join(names[:_LISTED]) + (" ..." if len(names) > _LISTED else "")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module, without its wrappers.

    Args:
        module: A module, possibly inside DistributedDataParallel, DataParallel or torch.compile, in any order.

    Returns:
        The innermost module.
    """
    while True:
        if "_orig_mod" in module._modules:  # torch.compile
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that torch.compile and activation checkpointing add.

    Args:
        name: Name of a parameter or buffer.

    Returns:
        The name that it has in the unwrapped module.
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


@dataclass(frozen=True)
class NamedTensors:
    """The live parameters and persistent buffers of a module. A tied tensor appears once, under its first name.

    Attributes:
        tensors: Name -> live tensor, in the module's order. Tensors of a PEFT adapter have PEFT's own names.
        adapter: Names of the tensors of the active PEFT adapter; empty without one.
        staying: Names of the tensors that never travel.
    """

    tensors: dict[str, Tensor]
    adapter: frozenset[str]
    staying: frozenset[str]

    @staticmethod
    def of(module: nn.Module, beside: Mapping[str, Tensor] | None = None) -> NamedTensors:
        """Return the tensors of a module.

        Args:
            module: The live module, with its wrappers or without.
            beside: Live tensors of other modules, by name. They come last.

        Returns:
            Its tensors by name.

        Raises:
            ConfigError: Several PEFT adapters are active.
        """
        module = unwrap(module)
        live = {id(t) for t in (*module.parameters(), *module.buffers())}
        state = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor) and id(v) in live}
        adapter = {id(tensor): plain_name(name) for name, tensor in _adapter_tensors(module, state).items()}
        wrapped = _wrapped_by_peft(module)
        first_name = {id(tensor): _unwrapped_name(plain_name(n), wrapped) for n, tensor in reversed(state.items())}
        tensors = {adapter.get(i, first_name[i]): tensor for tensor in state.values() if (i := id(tensor))}
        tensors |= beside or {}
        vectors = {id(vector) for layer in spectral_layers(module) for vector in (layer.u, layer.v)}
        stay = vectors | {id(tensor) for tensor in _inactive_adapter_tensors(module)}
        return NamedTensors(
            tensors, frozenset(adapter.values()), frozenset(name for name, t in tensors.items() if id(t) in stay)
        )


def exchanged_tensors(
    module: nn.Module,
    exchange: Exchange = "auto",
    keep_local: tuple[str, ...] = (),
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a module that travel.

    Args:
        module: The live module, with its wrappers or without.
        exchange: "auto" (trainable parameters and persistent buffers; of a PEFT model only the adapter), "trainable",
            "all", or name patterns with the wildcards of the shell.
        keep_local: Name patterns of tensors that never leave the site.
        beside: Live tensors of other modules that may travel too, by name; see `tensors_beside`.

    Returns:
        Name -> live tensor, in the module's order.

    Raises:
        ConfigError: A pattern matches no name or only tensors that never travel, no tensor is selected, or a selected
            tensor cannot be averaged.
    """
    named = NamedTensors.of(module, beside)
    _refuse_staying(named, exchange)
    admitted = set(selected(named.tensors, exchange, keep_local)) & _names_of_kind(named, exchange) - named.staying
    tensors = {name: tensor for name, tensor in named.tensors.items() if name in admitted}
    if not tensors:
        raise ConfigError(
            "no tensor of the model would travel",
            where=f"exchange={exchange!r}, keep_local={list(keep_local)!r}",
            fix="train at least one parameter, or choose what travels with exchange=",
        )
    for name, tensor in tensors.items():
        _check_can_travel(name, tensor)
    return tensors


def frozen_base(
    module: nn.Module,
    exchange: Exchange = "auto",
    keep_local: tuple[str, ...] = (),
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters that neither travel nor are trained: the base that must be equal at all sites.

    Args:
        module: The live module, with its wrappers or without.
        exchange: What travels; see `exchanged_tensors`.
        keep_local: Name patterns of tensors that never leave the site. They are left out here too.
        beside: Live tensors of other modules that may travel too, by name.

    Returns:
        Name -> live parameter, in the module's order.

    Raises:
        ConfigError: As `exchanged_tensors` does.
    """
    exchanged, named = exchanged_tensors(module, exchange, keep_local, beside), NamedTensors.of(module)
    return {
        name: tensor
        for name, tensor in named.tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if name not in exchanged and name not in named.staying and not matches(name, keep_local)
        if ".original_module." not in name  # PEFT's untrained copy of a module to save; the model does not use it
    }


def modules_in(owner: object) -> dict[str, nn.Module]:
    """Find the modules in the attributes of an object, such as a trainer's loss.

    Args:
        owner: A trainer, or a module whose attributes may hold further modules in lists and dicts.

    Returns:
        Attribute -> module; for lists, tuples and dicts of modules "<attribute>.<index or key>".
    """
    found: dict[str, nn.Module] = {}
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        items: Iterable[tuple[object, object]] = ()
        if isinstance(value, nn.Module):
            found[name] = value
        elif isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        found |= {f"{name}.{key}": item for key, item in items if isinstance(item, nn.Module)}
    return found


def tensors_beside(module: nn.Module, others: Mapping[str, nn.Module], optimizers: Iterable[Any]) -> dict[str, Tensor]:
    """Return the tensors that the optimizers train beside a module, such as the classifier of a loss.

    Args:
        module: The module that is trained, with its wrappers or without.
        others: Further modules, by name. They may contain `module` or parts of it.
        optimizers: All optimizers, wrapped or not.

    Returns:
        "<module>.<tensor>" -> live tensor, each once: trained parameters, and the buffers of the layers that have some.
        A name that the model has too begins with "beside.".
    """
    taken = NamedTensors.of(module).tensors
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    trained = {id(parameter) for parameter in parameters_of(optimizers)}
    found: dict[str, Tensor] = {}
    for name, other in others.items():
        state = {plain_name(n): t for n, t in other.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        layers = {n.rpartition(".")[0] for n, tensor in state.items() if id(tensor) in trained - known}
        for n, tensor in state.items():
            buffer = not isinstance(tensor, nn.Parameter) and n.rpartition(".")[0] in layers
            if id(tensor) not in known and (id(tensor) in trained or buffer):
                full_name = f"{name}.{n}"
                found[f"beside.{full_name}" if full_name in taken else full_name] = tensor
                known.add(id(tensor))
    return found


def parameters_of(optimizers: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters that optimizers train.

    Args:
        optimizers: Optimizers of torch, or wrappers with the attribute `optimizer`, such as accelerate's.

    Yields:
        Each live parameter, in the order of the parameter groups.
    """
    for _, parameter in _described(optimizers):
        yield parameter


def warn_of_unknown_parameters(
    module: nn.Module, optimizers: Iterable[Any], beside: Mapping[str, Tensor] | None = None
) -> None:
    """Warn of parameters that the optimizers train and that belong to no known module, so that they cannot travel.

    Args:
        module: The module that is trained.
        optimizers: All optimizers.
        beside: What can travel beside it; see `tensors_beside`.
    """
    known = {id(tensor) for tensor in (*module.parameters(), *(beside or {}).values())}
    unknown = [n for n, p in _described(optimizers) if p.requires_grad and id(p) not in known]
    if unknown:
        warnings.warn(
            "parameters that the optimizer trains are not part of the model, so they stay at this site and differ from "
            f"those of other sites. There are {len(unknown)}, by name or shape: {listed(unknown)}. To exchange them, "
            "make them part of the model: put several networks into one nn.ModuleDict",
            stacklevel=3,
        )


def _described(optimizers: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Parameters that optimizers train, each with its name, if the optimizer was given names, else with its shape."""
    for optimizer in optimizers:
        for group in getattr(optimizer, "optimizer", optimizer).param_groups:
            names = group.get("param_names") or [str(list(parameter.shape)) for parameter in group["params"]]
            yield from zip(names, group["params"], strict=True)


def _names_of_kind(named: NamedTensors, exchange: Exchange) -> set[str]:
    """Return the names that "auto", "trainable" or "all" selects. For patterns, return all names."""
    trainable = {name for name, tensor in named.tensors.items() if tensor.requires_grad}
    if exchange == "trainable":
        return trainable
    if exchange != "auto":
        return set(named.tensors)
    if not named.adapter:
        return trainable | {name for name, tensor in named.tensors.items() if not isinstance(tensor, nn.Parameter)}
    if outside := sorted(trainable - named.adapter):
        warnings.warn(
            f"these parameters are trained but not exchanged, because they are not a part of the PEFT adapter: "
            f"{listed(outside)}; to exchange them, use exchange='trainable' or PEFT's modules_to_save",
            stacklevel=2,
        )
    return set(named.adapter)


def _refuse_staying(named: NamedTensors, exchange: Exchange) -> None:
    """Raise ConfigError for a pattern that names only tensors that never travel."""
    for pattern in () if isinstance(exchange, str) else exchange:
        found = {name for name in named.tensors if matches(name, [pattern])}
        if found and found <= named.staying:
            raise ConfigError(
                f"exchange: the pattern {pattern!r} names only tensors that never travel: {listed(sorted(found))}",
                fix="leave it out: singular vectors of spectral normalisation follow from the weights, and a PEFT "
                "adapter must be active (model.set_adapter) to be exchanged",
            )


def _adapter_tensors(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the active adapter under PEFT's names; none if `module` is not a PEFT model."""
    if not hasattr(module, "peft_config") or not hasattr(module, "active_adapters"):
        return {}
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(module, PeftModel):
        return {}  # transformers has injected the adapter itself: its parameters are the trainable ones
    active: list[str] = list(module.active_adapters)
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} PEFT adapters are active: {', '.join(active)}",
            where=type(module).__name__,
            fix="activate the one to be exchanged with model.set_adapter(name)",
        )
    # PEFT's names are known only to PEFT's save function, which may copy tensors. So it gets stand-ins instead, each
    # filled with the number of a live tensor. A stand-in that it has cut no longer stands for a live tensor.
    raw_names = list(state)
    stand_ins = {
        name: torch.full((1,) * tensor.dim(), float(number), dtype=torch.float64).expand(tensor.shape)
        for number, (name, tensor) in enumerate(state.items())
    }
    saved = get_peft_model_state_dict(module, stand_ins, adapter_name=active[0], save_embedding_layers=False)
    numbers = {name: _number(tensor) for name, tensor in saved.items()}
    if all(
        n in range(len(raw_names)) and saved[name].shape == state[raw_names[n]].shape for name, n in numbers.items()
    ):
        return {name: state[raw_names[number]] for name, number in numbers.items()}
    # prompt learning saves a computed prompt, but what must travel is its parameters
    return {name: tensor for name, tensor in state.items() if tensor.requires_grad}


def _inactive_adapters(model: nn.Module) -> set[str]:
    """Names of the PEFT adapters of a model that are not active, which one site may have and others not."""
    configs, active = getattr(model, "peft_config", None), getattr(model, "active_adapters", None)
    if not isinstance(configs, dict) or len(configs) < 2 or active is None:
        return set()
    try:
        return configs.keys() - set(active() if callable(active) else active)
    except ValueError:  # a model of transformers within a PeftModel, which alone knows what is active
        return set()


def _inactive_adapter_tensors(module: nn.Module) -> Iterator[Tensor]:
    for model in module.modules():
        inactive = _inactive_adapters(model)
        for layer in model.modules() if inactive else ():
            if type(layer).__module__.startswith("peft."):
                for by_adapter in layer.children():
                    yield from _tensors_under(by_adapter, inactive)


def _tensors_under(by_adapter: Any, adapters: Iterable[str]) -> Iterator[Tensor]:
    """Tensors of these adapters in PEFT's containers of modules, parameters or buffers."""
    for adapter in adapters if hasattr(by_adapter, "keys") else ():
        part = by_adapter[adapter] if adapter in by_adapter else None  # noqa: SIM401
        if isinstance(part, nn.Module):
            yield from (*part.parameters(), *part.buffers())
        elif isinstance(part, Tensor):
            yield part


def _wrapped_by_peft(module: nn.Module) -> set[str]:
    """Paths of modules within PEFT's layers that the model goes on using, such as "encoder.query.base_layer"."""
    paths = {name for name, layer in module.named_modules() if type(layer).__module__.startswith("peft.")}
    wrapped = {f"{path}.base_layer" for path in paths}
    inactive = set().union(*(_inactive_adapters(model) for model in module.modules()))
    for path in paths:
        layer = module.get_submodule(path)
        saved = getattr(layer, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict) and set(saved) <= inactive:
            wrapped.add(f"{path}.original_module")
    return wrapped


def _unwrapped_name(name: str, wrapped: set[str]) -> str:
    """Name that a tensor has in a model without the layers that PEFT has put around it."""
    parts = name.split(".")
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return ".".join(part for part, path in zip(parts, paths, strict=True) if path not in wrapped)


def _number(stand_in: Tensor) -> int:
    """Return the number that a stand-in is filled with, or -1 for a tensor that is not a stand-in."""
    if stand_in.dtype != torch.float64 or stand_in.numel() == 0:
        return -1
    return int(stand_in[(0,) * stand_in.dim()])


def _check_can_travel(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ConfigError(
            "a tensor that should travel is not in memory (meta device)", where=name, fix="do not offload it"
        )
    refuse_unknown_shards(name, tensor)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ConfigError(
            f"tensors of dtype {tensor.dtype} cannot travel",
            where=name,
            fix=f"keep it at the site: keep_local=[{name!r}]",
        )
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ConfigError(
            f"a quantised weight ({tensor.dtype}) cannot be averaged",
            where=name,
            fix="train a PEFT adapter on the quantised model, and exchange only that (exchange='auto')",
        )
