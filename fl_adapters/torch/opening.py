"""Opens the tensors that a run has left: as a state dict, or in a module of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from fl_adapters.torch.selection import plain_name, unwrap
from fl_runtime.errors import ConfigError, StateMismatchError

_SHOWN = 8


def open_model(folder: Path, into: Any = None, *, partial: bool = False) -> Any:
    """Open `model.safetensors` in the folder of a model.

    Args:
        folder: Folder of the model.
        into: A module, which gets the tensors in place; None for a state dict.
        partial: Whether the module keeps its own values for tensors that the file lacks.

    Returns:
        The module, or the state dict: name -> tensor on the CPU.

    Raises:
        ConfigError: `into` is a class, or there is no such file.
        StateMismatchError: The tensors do not fit the module, which is as it was.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ConfigError(
            "there is no model.safetensors", where=str(folder), fix="open the files there with their own framework"
        )
    if into is None:
        return load_file(file)
    if not isinstance(into, nn.Module):
        raise ConfigError(
            f"{into.__name__} is a class, and the files do not say how to make one of it",
            where="load(into=)",
            fix=f"make it as for training: load(into={into.__name__}(...))",
        )
    return load_into(into, load_file(file), partial=partial)


def load_into(module: nn.Module, tensors: dict[str, Tensor], *, partial: bool = False) -> nn.Module:
    """Copy tensors into a module, in place. Tensors that are tied may have any one of their names.

    Args:
        module: The module. Wrappers of torch.compile and of distributed training do not matter.
        tensors: Name -> tensor.
        partial: Whether the module keeps its own values for tensors that are missing.

    Returns:
        The module.

    Raises:
        StateMismatchError: The tensors do not fit the module, which is as it was.
    """
    state = {plain_name(name): tensor for name, tensor in unwrap(module).state_dict(keep_vars=True).items()}
    given = {id(state[name]) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in given]
    unknown = [name for name in tensors if name not in state]
    other = [
        f"{name}: {tuple(tensors[name].shape)} in the run, {tuple(state[name].shape)} in the module"
        for name in tensors
        if name in state and tensors[name].shape != state[name].shape
    ]
    if unknown or other:
        lines = [*other, *(f"{name}: not in the module" for name in unknown)]
        raise StateMismatchError(
            f"the model of the run does not fit this {type(module).__name__}:\n    " + "\n    ".join(lines[:_SHOWN]),
            where="load(into=)",
            fix="make the module as the sites' script does",
        )
    if missing and not partial:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise StateMismatchError(
            f"the model of the run has no {', '.join(missing[:_SHOWN])}{more}",
            where="load(into=)",
            fix="give the module with the values that they had at the sites, and partial=True to keep those",
        )
    for name, tensor in tensors.items():
        state[name].data.copy_(tensor)
    return module
