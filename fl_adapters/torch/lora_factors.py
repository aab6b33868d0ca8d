"""The state of a LoRA model under a strategy that sums products: factors of any rank arrive, of which the site trains
a part, while the rest goes into its base weights."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.state import Specs, TorchState, as_tensor, is_sharded, unwrap
from fl_runtime.aggregation.lora.names import Pair, pairs_of
from fl_runtime.aggregation.lora.products import LoraProducts
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array, Arrays


@dataclass(frozen=True)
class _Module:
    """A LoRA layer of PEFT's, and its part in one adapter. path: its name in the model."""

    path: str
    layer: Any
    adapter: str

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r): what PEFT multiplies B A by."""
        return float(self.layer.scaling[self.adapter])

    @property
    def weight(self) -> Tensor:
        """Of the base layer, live."""
        weight: Tensor = self.layer.get_base_layer().weight
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the base weight is [in, out]."""
        return bool(getattr(self.layer, "fan_in_fan_out", False)) or self.embeds

    @property
    def embeds(self) -> bool:
        return self.adapter in self.layer.lora_embedding_A

    def factor(self, which: str) -> Tensor:
        """The live factor "A" or "B"."""
        if self.embeds:
            return getattr(self.layer, f"lora_embedding_{which}")[self.adapter]  # type: ignore[no-any-return]
        return getattr(self.layer, f"lora_{which}")[self.adapter].weight  # type: ignore[no-any-return]

    def replace(self, b: Tensor, a: Tensor) -> None:
        """Make these the factors, of whatever rank they are, with the scale 1."""
        for which, value in (("A", a), ("B", b)):
            old = self.factor(which)
            new = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
            if self.embeds:
                getattr(self.layer, f"lora_embedding_{which}")[self.adapter] = new
            else:
                linear = getattr(self.layer, f"lora_{which}")[self.adapter]
                linear.weight, linear.out_features, linear.in_features = new, new.shape[0], new.shape[1]
        rank = a.shape[0]
        self.layer.r[self.adapter] = self.layer.lora_alpha[self.adapter] = rank
        self.layer.scaling[self.adapter] = 1.0


class LoraFactors(TorchState):
    """`get_state` gives this site's own factors, B multiplied by the scale. What is set is the global model: the site
    trains the part of it that the strategy says, and its base weights become those of the start plus the rest.

    Keeps the base weights of the start (of the adapted modules, once they change) and the last global factors in host
    memory. `set_final` makes the adapter hold all of the global factors, with their rank and the scale 1, and the base
    what it was at the start: what PEFT saves then fits the base that the user has. The model keeps its live parameters
    until then.

    Raises ConfigError for modules whose products cannot be formed, or whose base cannot be changed where it has to be.
    """

    def __init__(
        self, model: nn.Module, exchange: Exchange, keep_local: tuple[str, ...], strategy: LoraProducts
    ) -> None:
        super().__init__(model, exchange, keep_local)
        self._model, self._strategy, self._whole = unwrap(model), strategy, False
        self._modules = _modules(self._model, self.tensors)
        self._pairs = {name: pair for pair in self._modules for name in (pair.a, pair.b)}
        self._start: dict[Pair, Tensor] = {}
        self._half: dict[str, Tensor] = {}
        self._global: dict[str, Array] = {}
        names = Counter(id(p) for _, p in self._model.named_parameters(remove_duplicate=False))
        for module in self._modules.values():
            _check_product(module, strategy.name)
            if strategy.changes_base:
                _check_base(module, strategy.name, tied=names[id(module.weight)] > 1)

    @torch.no_grad()
    def get_state(self) -> dict[str, Array]:
        """See the class. The arrays are views of buffers: valid until the next call."""
        arrays = super().get_state()
        for pair, module in self._modules.items():
            self._host[pair.b].mul_(module.scale)
        return arrays

    def set_final(self, arrays: Arrays) -> None:
        """See the class. From now on what is set is set like this."""
        self._whole = True
        self.set_state(arrays)
        self._describe()

    def set_state(self, arrays: Arrays) -> None:
        """The global model. Raises StateMismatchError, before touching anything."""
        super().set_state(arrays)
        if self._whole:
            self._describe()

    def set_apart(self) -> Arrays:
        """Copies of the last global arrays."""
        return dict(self._global)

    def check(self, specs: Specs) -> None:
        """The factors may have any rank, that of A and B the same."""
        own, found = self.specs, dict(specs)
        for pair in self._modules:
            if pair.a in specs and pair.b in specs:
                (a, dtype), (b, _) = specs[pair.a], specs[pair.b]
                if len(a) == len(b) == 2 and a[0] == b[1]:
                    rank = own[pair.a][0][0]
                    found[pair.a], found[pair.b] = ((rank, a[1]), dtype), ((b[0], rank), specs[pair.b][1])
        super().check(found)

    @torch.no_grad()
    def copy_in(self, name: str, array: Array, *, base_alone: bool = False) -> None:
        """One array of the global model; factors take effect when both are there. base_alone: what the site trains
        stays as it is."""
        if name not in self._pairs:
            if not base_alone:
                super().copy_in(name, array)
                self._global[name] = array.copy()
            return
        self._global[name] = array.copy()
        self._half[name] = as_tensor(self._global[name])
        pair = self._pairs[name]
        if pair.a in self._half and pair.b in self._half:
            b, a = self._half.pop(pair.b), self._half.pop(pair.a)
            if self._whole:
                self._set_whole(pair, b, a)
            else:
                self._set_part(pair, b, a, base_alone=base_alone)

    def _set_part(self, pair: Pair, b: Tensor, a: Tensor, *, base_alone: bool) -> None:
        module = self._modules[pair]
        own_a, own_b = module.factor("A"), module.factor("B")
        rank = own_a.shape[0]
        taken = 0 if self._strategy.site_part == "none" else min(rank, a.shape[0])
        if self._strategy.changes_base:
            self._set_base(pair, b[:, taken:], a[taken:])
        if base_alone:
            return
        if taken < rank:
            _begin(own_b, own_a, module.embeds, seed=zlib.crc32(a.contiguous().view(torch.uint8).numpy().data))
        own_a[:taken] = a[:taken].to(own_a)
        own_b[:, :taken] = (b[:, :taken] / module.scale).to(own_b)

    def _set_whole(self, pair: Pair, b: Tensor, a: Tensor) -> None:
        module = self._modules[pair]
        if pair in self._start:
            module.weight.copy_(self._start[pair])
        module.replace(b, a)
        self.tensors[pair.a], self.tensors[pair.b] = module.factor("A"), module.factor("B")
        for name in (pair.a, pair.b):
            self._host.pop(name, None)

    def _set_base(self, pair: Pair, b: Tensor, a: Tensor) -> None:
        """The weight of the start plus b @ a, in float32 or wider."""
        module = self._modules[pair]
        weight = module.weight
        if pair not in self._start:
            if a.shape[0] == 0:
                return
            self._start[pair] = weight.detach().cpu().clone()
        wide = torch.promote_types(weight.dtype, torch.float32)
        b, a = b.to(weight.device, wide), a.to(weight.device, wide)
        change = a.T @ b.T if module.transposed else b @ a
        weight.copy_(change.add_(self._start[pair].to(weight.device, wide)))

    def _describe(self) -> None:
        """Make PEFT's settings, which are saved beside the adapter, say what it has become."""
        ranks = {module.path: module.layer.r[module.adapter] for module in self._modules.values()}
        adapter = next(iter(self._modules.values())).adapter
        same = len(set(ranks.values())) == 1
        for module in self._model.modules():  # the model itself, or what it wraps
            configs: Any = getattr(module, "peft_config", None)
            if isinstance(configs, dict) and adapter in configs:
                config = configs[adapter]
                config.r = config.lora_alpha = max(ranks.values())
                config.rank_pattern, config.alpha_pattern = ({}, {}) if same else (dict(ranks), dict(ranks))
                config.use_rslora = False


def _modules(model: nn.Module, tensors: dict[str, Tensor]) -> dict[Pair, _Module]:
    """The layer of every pair among `tensors`, by the identity of its live factors."""
    found: dict[int, _Module] = {}
    for path, layer in model.named_modules():
        for adapter in (*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())):
            if isinstance(getattr(layer, "scaling", None), dict):
                module = _Module(path.rpartition("base_model.model.")[2], layer, adapter)
                found[id(module.factor("A"))] = module
    return {pair: found[id(tensors[pair.a])] for pair in pairs_of(tensors) if id(tensors[pair.a]) in found}


def _begin(b: Tensor, a: Tensor, embeds: bool, seed: int) -> None:
    """New factors whose product is zero, as PEFT begins: A uniform within 1 / sqrt(in) and B zero, or for an embedding
    A zero and B normal. The same at all sites, as far as their ranks go."""
    generator = torch.Generator().manual_seed(seed)
    if embeds:
        a.zero_()
        b.copy_(torch.randn(b.T.shape, generator=generator).T)
    else:
        bound = 1 / math.sqrt(a.shape[1])
        a.copy_(torch.rand(a.shape, generator=generator) * 2 * bound - bound)
        b.zero_()


def _check_product(module: _Module, strategy: str) -> None:
    variant = getattr(module.layer, "lora_variant", {}).get(module.adapter)
    kind = type(module.layer).__name__
    if module.factor("A").dim() != 2 or kind == "ParamWrapper":
        reason = f"{strategy} cannot form the product of the factors of a {kind} layer, which are no matrices"
    elif getattr(module.layer, "lora_bias", {}).get(module.adapter):
        reason = f"{strategy} cannot sum the products of a layer whose B has a bias (lora_bias)"
    elif variant is not None and "dora" not in type(variant).__name__.lower():
        reason = f"{strategy} does not know what PEFT's {type(variant).__name__} does with the product"
    else:
        return
    raise ConfigError(reason, where=module.path, fix="leave it out of target_modules, or use fedit or ffa-lora")


def _check_base(module: _Module, strategy: str, *, tied: bool) -> None:
    """What is added to has to be there, as numbers, for this module alone."""
    weight = getattr(module.layer.get_base_layer(), "weight", None)
    kind = type(module.layer)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        reason = "is quantised: what is added to it would be lost in the rounding"
    elif weight.is_meta or is_sharded(weight):
        reason = "is not held as a whole by this process"
    elif tied:
        reason = "is tied to another layer, which would change too"
    elif kind.__name__ not in ("Linear", "Embedding") or kind.__module__ != "peft.tuners.lora.layer":
        reason = f"belongs to a {kind.__module__}.{kind.__name__}, whose weight this version cannot change"
    else:
        return
    raise ConfigError(
        f"{strategy} adds to the base weight, and this one {reason}",
        where=module.path,
        fix="use a strategy that leaves the base alone: flexlora, fedit, ffa-lora, rolora or fedsa-lora",
    )
