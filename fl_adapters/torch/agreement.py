"""What all sites must have in common before round 1, beside the tensors that travel: the same architecture, the same
adapter settings, and the same frozen weights underneath."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.state import frozen_rest, unwrap, whole

FULL_HASH_BYTES = 2 << 30
"""Up to this size every byte of the frozen weights is hashed, in about a second; above, blocks of each tensor."""

_BLOCKS, _BLOCK_BYTES = 64, 4096
_PEFT_FIELDS = (
    "peft_type r lora_alpha target_modules target_parameters modules_to_save use_dora use_rslora bias fan_in_fan_out "
    "rank_pattern alpha_pattern layers_to_transform layers_pattern feedforward_modules exclude_modules "
    "num_virtual_tokens trainable_token_indices"
).split()
_CONFIG_FIELDS = "num_attention_heads num_key_value_heads hidden_act".split()  # what shapes do not show


def agreement(
    module: nn.Module, *, framework: str, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()
) -> dict[str, str]:
    """Name -> value of what must be equal at all sites, for `Session.register`."""
    module = unwrap(module)
    base = getattr(module, "get_base_model", lambda: module)()
    # fully_shard() gives a module a class of its own, in torch's module, above the user's
    own = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed."))
    facts = {"framework": framework, "model": own.__name__}
    config = getattr(base, "config", None)
    for field in _CONFIG_FIELDS:
        if isinstance(value := getattr(config, field, None), int | str):
            facts[f"model.{field}"] = str(value)
    facts |= _peft_facts(module)
    frozen = frozen_rest(module, exchange, keep_local)
    if frozen:
        facts["base.tensors"] = str(len(frozen))
        facts["base.parameters"] = str(sum(t.numel() for t in frozen.values()))
        facts["base.dtypes"] = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in frozen.values()}))
        facts["base.fingerprint"] = fingerprint(frozen)
    return facts


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor], *, full_bytes: int = FULL_HASH_BYTES) -> str:
    """A hash (xxh3, 128 bit, hexadecimal) over names, shapes, dtypes and contents, in the order of the names.

    Together larger than `full_bytes`, each tensor of more than 64 blocks of 4 KiB is hashed in 64 blocks spread over
    it, the first and the last included; which way is taken depends on sizes alone, so all sites take the same.
    It guards against mistakes, not against an attacker.
    """
    full = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= full_bytes
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{list(tensor.shape)}|{tensor.dtype}|".encode())
        for piece in _pieces(tensor, full):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor, full: bool) -> list[Tensor]:
    """`tensor` as flat byte tensors: one, or blocks spread over it."""
    if tensor.numel() == 0:
        return []
    data = whole(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
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
    """One spelling for each value: sets and lists sorted, enums by their value."""
    if isinstance(value, set | frozenset | list | tuple):
        return json.dumps(sorted(str(v) for v in value))
    if isinstance(value, Mapping):
        return json.dumps({str(k): str(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))})
    return str(getattr(value, "value", value))
