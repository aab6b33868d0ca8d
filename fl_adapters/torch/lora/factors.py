"""The state of a LoRA model under a strategy that averages the products B A instead of the factors.

Global factors of any rank arrive. The site trains a part of them and adds the rest to its base weights.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.ranks.shards import is_sharded
from fl_adapters.torch.selection import unwrap
from fl_adapters.torch.state import Specs, TorchState, as_tensor
from fl_runtime.aggregation.lora.names import Pair, pairs_of
from fl_runtime.aggregation.lora.products import LoraProducts
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array, Arrays


@dataclass(frozen=True)
class _LoraLayer:
    """A LoRA layer of PEFT, as one adapter uses it.

    Attributes:
        path: Name of the layer in the model.
        module: The live layer.
        adapter: Name of the adapter.
    """

    path: str
    module: Any
    adapter: str

    @property
    def scale(self) -> float:
        """Factor by which PEFT multiplies the product B A: alpha / r, or alpha / sqrt(r)."""
        return float(self.module.scaling[self.adapter])

    @property
    def weight(self) -> Tensor:
        """The live weight of the base layer."""
        weight: Tensor = self.module.get_base_layer().weight
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the base weight has the shape [in, out] instead of [out, in]."""
        return bool(getattr(self.module, "fan_in_fan_out", False)) or self.embeds

    @property
    def embeds(self) -> bool:
        """Whether the base layer is an embedding."""
        return self.adapter in self.module.lora_embedding_A

    def factor(self, which: str) -> Tensor:
        """Return the live factor "A" or "B"."""
        if self.embeds:
            return getattr(self.module, f"lora_embedding_{which}")[self.adapter]  # type: ignore[no-any-return]
        return getattr(self.module, f"lora_{which}")[self.adapter].weight  # type: ignore[no-any-return]

    def replace(self, b: Tensor, a: Tensor) -> None:
        """Replace the factors by new parameters, which may have another rank, and set the scale to 1."""
        for which, value in (("A", a), ("B", b)):
            old = self.factor(which)
            new = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
            if self.embeds:
                getattr(self.module, f"lora_embedding_{which}")[self.adapter] = new
            else:
                linear = getattr(self.module, f"lora_{which}")[self.adapter]
                linear.weight, linear.out_features, linear.in_features = new, new.shape[0], new.shape[1]
        rank = a.shape[0]
        self.module.r[self.adapter] = self.module.lora_alpha[self.adapter] = rank
        self.module.scaling[self.adapter] = 1.0


class LoraFactors(TorchState):
    """The LoRA factors of a model whose strategy averages products.

    `get_state` returns this site's own factors, with B multiplied by the scale, so that B A is what the layer adds.
    `set_state` takes the global factors. The site trains the part of them that the strategy chooses; its base weights
    become their initial values plus the product of the rest.

    `restore_global` ends this: the adapter then holds all global factors, with their rank and the scale 1, and the base
    weights have their initial values. So what PEFT saves fits the base model that the user has. Only this call
    replaces live parameters.

    The initial base weights (of adapted layers, once they change) and the last global factors stay in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: Exchange,
        keep_local: tuple[str, ...],
        strategy: LoraProducts,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Check that the strategy can work with every adapted layer.

        Args:
            model: The live PEFT model.
            exchange: What travels; see `exchanged_tensors`.
            keep_local: Name patterns of tensors that never leave the site.
            strategy: The job's strategy.
            beside: Live tensors of other modules that may travel too, by name.

        Raises:
            ConfigError: The product of a layer's factors cannot be formed, or the strategy must change a base weight
                that cannot be changed.
        """
        super().__init__(model, exchange, keep_local, beside)
        self._model, self._strategy, self._is_final = unwrap(model), strategy, False
        self._layers = _layers_of(self._model, self.tensors)
        self._pairs = {name: pair for pair in self._layers for name in (pair.a, pair.b)}
        self._start_weights: dict[Pair, Tensor] = {}
        self._unpaired: dict[str, Tensor] = {}
        self._global: dict[str, Array] = {}
        names = Counter(id(p) for _, p in self._model.named_parameters(remove_duplicate=False))
        for layer in self._layers.values():
            _check_product(layer, strategy.name)
            if strategy.changes_base:
                _check_base(layer, strategy.name, tied=names[id(layer.weight)] > 1)

    @torch.no_grad()
    def get_state(self) -> dict[str, Array]:
        """Copy this site's factors to host arrays, B multiplied by the scale. Borrowed until the next call."""
        arrays = super().get_state()
        for pair, layer in self._layers.items():
            self._host[pair.b].mul_(layer.scale)
        return arrays

    def restore_global(self, arrays: Arrays) -> None:
        """Give the adapter all global factors, and the base weights their initial values.

        Later calls of `set_state` do the same.

        Args:
            arrays: The global factors, and other tensors that travel.

        Raises:
            StateMismatchError: They do not fit the model. Nothing is changed then.
        """
        self._is_final = True
        self.set_state(arrays)
        self._update_peft_config()

    def set_state(self, arrays: Arrays) -> None:
        """Set the global factors; see the class.

        Args:
            arrays: The global factors, and other tensors that travel. Borrowed for the call.

        Raises:
            StateMismatchError: They do not fit the model. Nothing is changed then.
        """
        super().set_state(arrays)
        if self._is_final:
            self._update_peft_config()

    def snapshot_global(self) -> Arrays:
        """Return the last global arrays, for `restore_global`.

        Returns:
            Name -> host array. Later calls of `set_state` do not change them.
        """
        return dict(self._global)

    def check(self, specs: Specs) -> None:
        """Check that tensors fit the model. Factors may have any rank, if A and B have the same.

        Args:
            specs: Tensor name -> (shape, dtype name).

        Raises:
            StateMismatchError: They do not fit; a line for each tensor.
        """
        own, with_own_ranks = self.specs, dict(specs)
        for pair in self._layers:
            if pair.a in specs and pair.b in specs:
                (a, dtype), (b, _) = specs[pair.a], specs[pair.b]
                if len(a) == len(b) == 2 and a[0] == b[1]:
                    rank = own[pair.a][0][0]
                    with_own_ranks[pair.a] = (rank, a[1]), dtype
                    with_own_ranks[pair.b] = (b[0], rank), specs[pair.b][1]
        super().check(with_own_ranks)

    @torch.no_grad()
    def copy_in(self, name: str, array: Array, *, base_alone: bool = False) -> None:
        """Set one tensor of the global model. A factor takes effect when its partner has arrived as well.

        Args:
            name: Name of the tensor.
            array: Its values; copied.
            base_alone: Whether to change base weights only, and leave all trained tensors as they are.
        """
        if name not in self._pairs:
            if not base_alone:
                super().copy_in(name, array)
                self._global[name] = array.copy()
            return
        self._global[name] = array.copy()
        self._unpaired[name] = as_tensor(self._global[name])
        pair = self._pairs[name]
        if pair.a in self._unpaired and pair.b in self._unpaired:
            b, a = self._unpaired.pop(pair.b), self._unpaired.pop(pair.a)
            if self._is_final:
                self._set_global_factors(pair, b, a)
            else:
                self._set_site_part(pair, b, a, base_alone=base_alone)

    def _set_site_part(self, pair: Pair, b: Tensor, a: Tensor, *, base_alone: bool) -> None:
        """Set the part of the global factors that the site trains, and add the rest to the base weight."""
        layer = self._layers[pair]
        own_a, own_b = layer.factor("A"), layer.factor("B")
        rank = own_a.shape[0]
        global_dims = 0 if self._strategy.site_part == "none" else min(rank, a.shape[0])
        if self._strategy.changes_base:
            self._set_base(pair, b[:, global_dims:], a[global_dims:])
        if base_alone:
            return
        if global_dims < rank:
            _init_factors(own_b, own_a, layer.embeds, seed=zlib.crc32(a.contiguous().view(torch.uint8).numpy().data))
        own_a[:global_dims] = a[:global_dims].to(own_a)
        own_b[:, :global_dims] = (b[:, :global_dims] / layer.scale).to(own_b)

    def _set_global_factors(self, pair: Pair, b: Tensor, a: Tensor) -> None:
        layer = self._layers[pair]
        if pair in self._start_weights:
            layer.weight.copy_(self._start_weights[pair])
        layer.replace(b, a)
        self.tensors[pair.a], self.tensors[pair.b] = layer.factor("A"), layer.factor("B")
        for name in (pair.a, pair.b):
            self._host.pop(name, None)

    def _set_base(self, pair: Pair, b: Tensor, a: Tensor) -> None:
        """Set the base weight to its initial value plus b @ a, computed in float32 or wider."""
        layer = self._layers[pair]
        weight = layer.weight
        if pair not in self._start_weights:
            if a.shape[0] == 0:
                return
            self._start_weights[pair] = weight.detach().cpu().clone()
        wide = torch.promote_types(weight.dtype, torch.float32)
        b, a = b.to(weight.device, wide), a.to(weight.device, wide)
        change = a.T @ b.T if layer.transposed else b @ a
        weight.copy_(change.add_(self._start_weights[pair].to(weight.device, wide)))

    def _update_peft_config(self) -> None:
        """Update rank and scale in PEFT's settings, which are saved beside the adapter."""
        ranks = {layer.path: layer.module.r[layer.adapter] for layer in self._layers.values()}
        adapter = next(iter(self._layers.values())).adapter
        same = len(set(ranks.values())) == 1
        for module in self._model.modules():  # the model itself, or what it wraps
            configs: Any = getattr(module, "peft_config", None)
            if isinstance(configs, dict) and adapter in configs:
                config = configs[adapter]
                config.r = config.lora_alpha = max(ranks.values())
                config.rank_pattern, config.alpha_pattern = ({}, {}) if same else (dict(ranks), dict(ranks))
                config.use_rslora = False


def _layers_of(model: nn.Module, tensors: dict[str, Tensor]) -> dict[Pair, _LoraLayer]:
    """Return the layer of each pair of factors in `tensors`. Layers are matched by the identity of their live A."""
    layer_of_factor: dict[int, _LoraLayer] = {}
    for path, module in model.named_modules():
        for adapter in (*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())):
            if isinstance(getattr(module, "scaling", None), dict):
                layer = _LoraLayer(path.rpartition("base_model.model.")[2], module, adapter)
                layer_of_factor[id(layer.factor("A"))] = layer
    return {
        pair: layer_of_factor[id(tensors[pair.a])]
        for pair in pairs_of(tensors)
        if id(tensors[pair.a]) in layer_of_factor
    }


def _init_factors(b: Tensor, a: Tensor, embeds: bool, seed: int) -> None:
    """Set factors to PEFT's initial values, whose product is zero.

    A is uniform within 1 / sqrt(in) and B zero; for an embedding, A is zero and B normal. Sites of the same rank get
    the same values.
    """
    generator = torch.Generator().manual_seed(seed)
    if embeds:
        a.zero_()
        b.copy_(torch.randn(b.T.shape, generator=generator).T)
    else:
        bound = 1 / math.sqrt(a.shape[1])
        a.copy_(torch.rand(a.shape, generator=generator) * 2 * bound - bound)
        b.zero_()


def _check_product(layer: _LoraLayer, strategy: str) -> None:
    variant = getattr(layer.module, "lora_variant", {}).get(layer.adapter)
    kind = type(layer.module).__name__
    if layer.factor("A").dim() != 2 or kind == "ParamWrapper":
        reason = f"{strategy} multiplies the two LoRA factors, but those of a {kind} layer are not matrices"
    elif getattr(layer.module, "lora_bias", {}).get(layer.adapter):
        reason = f"{strategy} cannot average the products of a layer whose B has a bias (lora_bias=True)"
    elif variant is not None and "dora" not in type(variant).__name__.lower():
        reason = f"{strategy} does not support PEFT's {type(variant).__name__}, which changes the product"
    else:
        return
    raise ConfigError(reason, where=layer.path, fix="leave it out of target_modules, or use fedit or ffa-lora")


def _check_base(layer: _LoraLayer, strategy: str, *, tied: bool) -> None:
    """Refuse a base weight that the strategy cannot add to."""
    weight = getattr(layer.module.get_base_layer(), "weight", None)
    kind = type(layer.module)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        reason = "is quantised, so small changes would be lost in rounding"
    elif weight.is_meta or is_sharded(weight):
        reason = "is not complete in this process (offloaded or sharded)"
    elif tied:
        reason = "is tied to another layer, which would change as well"
    elif kind.__name__ not in ("Linear", "Embedding") or kind.__module__ != "peft.tuners.lora.layer":
        reason = f"belongs to a {kind.__module__}.{kind.__name__}, whose weight this version cannot change"
    else:
        return
    raise ConfigError(
        f"{strategy} adds to the base weight, but this one {reason}",
        where=layer.path,
        fix="use a strategy that does not change the base: flexlora, fedit, ffa-lora, rolora or fedsa-lora",
    )
