"""Facts about a torch model that must be equal at all sites: architecture, PEFT settings, and frozen weights.

The handshake compares them before round 1, beside the tensors that travel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.ranks.shards import full_tensor
from fl_adapters.torch.selection import frozen_base, unwrap
from fl_runtime.wire.names import TENSORS_OF, Names

FULL_HASH_BYTES = 2 << 30
"""Largest size in bytes at which all of the frozen weights is hashed, which takes about a second."""

_BLOCKS, _BLOCK_BYTES = 64, 4096
_PEFT_FIELDS = (
    "peft_type r lora_alpha target_modules target_parameters modules_to_save use_dora use_rslora bias fan_in_fan_out "
    "rank_pattern alpha_pattern layers_to_transform layers_pattern feedforward_modules exclude_modules "
    "num_virtual_tokens trainable_token_indices"
).split()
_CONFIG_FIELDS = "num_attention_heads num_key_value_heads hidden_act".split()  # settings that no shape shows


def agreement(
    module: nn.Module,
    *,
    framework: str,
    exchange: Exchange = "auto",
    keep_local: tuple[str, ...] = (),
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, str | Names]:
    """Return the facts about a model that must be equal at all sites, for `Session.register`.

    Collective if the model is sharded: every rank must call it.

    Args:
        module: The live module, with its wrappers or without.
        framework: Name of the training framework.
        exchange: What travels; see `exchanged_tensors`.
        keep_local: Name patterns of tensors that never leave the site, and need not be equal.
        beside: Live tensors of other modules that may travel too, by name.

    Returns:
        Fact -> value, such as "base.fingerprint" -> a hash of the frozen weights, and the list of their tensors.

    Raises:
        ConfigError: A pattern matches no name, or a selected tensor cannot travel.
    """
    module = unwrap(module)
    base = getattr(module, "get_base_model", lambda: module)()
    # fully_shard() puts a class of torch's before the user's class
    user_class = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed."))
    facts: dict[str, str | Names] = {"framework": framework, "model": user_class.__name__}
    config = getattr(base, "config", None)
    for field in _CONFIG_FIELDS:
        if isinstance(value := getattr(config, field, None), int | str):
            facts[f"model.{field}"] = str(value)
    facts |= _peft_facts(module)
    frozen = frozen_base(module, exchange, keep_local, beside)
    if frozen:
        facts["base.tensors"] = str(len(frozen))
        facts["base.parameters"] = str(sum(t.numel() for t in frozen.values()))
        facts["base.dtypes"] = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in frozen.values()}))
        facts |= fingerprinted("base.fingerprint", frozen)
    return facts


def fingerprinted(name: str, tensors: Mapping[str, Tensor]) -> dict[str, str | Names]:
    """Return the facts about tensors that must be equal at all sites and do not travel.

    Collective if a tensor is sharded.

    Args:
        name: What the tensors are, for the error where sites differ.
        tensors: Name -> tensor, on any device.

    Returns:
        The hash of all tensors, and a list with the hash of each, by which the error names those that differ.
    """
    digests = _digests(tensors, FULL_HASH_BYTES)
    entries = tuple(f"{digest} {tensor}" for tensor, digest in digests.items())
    return {name: _joined(digests), f"{TENSORS_OF}{name}": Names(entries)}


def fingerprint(tensors: Mapping[str, Tensor], *, full_bytes: int = FULL_HASH_BYTES) -> str:
    """Return a hash of tensors: xxh3 over names, shapes, dtypes and contents, in the order of the names.

    It guards against mistakes, not against an attacker. Collective if a tensor is sharded.

    Args:
        tensors: Name -> tensor, on any device.
        full_bytes: Largest total size in bytes at which all bytes are hashed. Above it, only 64 blocks of 4 KiB are
            hashed of each tensor that is larger than that, spread over it, with the first and the last block. Sites
            with equal shapes thus always choose the same way.

    Returns:
        128 bits as 32 hexadecimal digits.
    """
    return _joined(_digests(tensors, full_bytes))


def _joined(digests: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(f"{name}|{digest}|" for name, digest in digests.items()).encode())


@torch.no_grad()
def _digests(tensors: Mapping[str, Tensor], full_bytes: int) -> dict[str, str]:
    """Hash of each tensor, by name, in the order of the names."""
    full = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= full_bytes
    found = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest = xxhash.xxh3_64(f"{list(tensor.shape)}|{tensor.dtype}|".encode())
        for piece in _hashed_bytes(tensor, full):
            digest.update(piece.cpu().numpy().data)
        found[name] = digest.hexdigest()
    return found


def _hashed_bytes(tensor: Tensor, full: bool) -> list[Tensor]:
    """Return the bytes to hash, as at most one tensor of dtype uint8: all bytes, or blocks spread over the tensor."""
    if tensor.numel() == 0:
        return []
    data = full_tensor(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    if full or data.numel() <= _BLOCKS * _BLOCK_BYTES:
        return [data]
    last = data.numel() - _BLOCK_BYTES
    starts = torch.tensor([last * i // (_BLOCKS - 1) for i in range(_BLOCKS)], device=data.device)
    return [data[starts[:, None] + torch.arange(_BLOCK_BYTES, device=data.device)]]


def _peft_facts(module: nn.Module) -> dict[str, str]:
    configs: Mapping[str, Any] | None = getattr(module, "peft_config", None)
    if not configs:
        return {}
    active = getattr(module, "active_adapters", None)
    active = active() if callable(active) else active
    config = configs[active[0]] if active else next(iter(configs.values()))
    return {
        f"peft.{field}": _normal(getattr(config, field))
        for field in _PEFT_FIELDS
        if getattr(config, field, None) is not None
    }


def _normal(value: object) -> str:
    """Return the same text for equal settings: collections are sorted, and an enumeration counts as its value."""
    if isinstance(value, set | frozenset | list | tuple):
        return json.dumps(sorted(str(v) for v in value))
    if isinstance(value, Mapping):
        return json.dumps({str(k): str(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))})
    return str(getattr(value, "value", value))
