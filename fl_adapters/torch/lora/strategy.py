"""LoRA strategies on a live torch model: what travels, what must be equal at all sites, and which factor is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fl_adapters.participant.exchange import matches
from fl_adapters.participant.local_work.site_plan import SitePlan
from fl_adapters.participant.options import SiteSettings
from fl_adapters.torch.handshake.agreement import fingerprinted
from fl_adapters.torch.lora.factors import LoraFactors
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.ranks.sharded_state import ShardedState, state_of
from fl_adapters.torch.ranks.shards import is_sharded
from fl_adapters.torch.state import TorchState
from fl_runtime.aggregation.lora.names import FROZEN, factor_of, frozen_as, frozen_patterns, pairs_of
from fl_runtime.aggregation.lora.products import LoraProducts
from fl_runtime.aggregation.lora.strategies import LoraAverage
from fl_runtime.errors import ConfigError
from fl_runtime.wire.names import Names

_RANKS = "peft.r peft.lora_alpha peft.rank_pattern peft.alpha_pattern peft.use_rslora".split()


def lora_state(
    model: nn.Module, default: TorchState, settings: SiteSettings, beside: Mapping[str, Tensor]
) -> TorchState:
    """Return the state that a model exchanges under the job's strategy.

    Args:
        model: The live model.
        default: The state that it exchanges under a strategy that is not for LoRA.
        settings: Settings that hold at this site.
        beside: Live tensors of other modules that may travel too, by name.

    Returns:
        `default` for other strategies, and for a model without an adapter, which the handshake will refuse.

    Raises:
        ConfigError: The strategy cannot work with the model or the settings.
    """
    strategy = settings.plan.lora
    if strategy is None or not pairs_of(default.tensors):
        return default
    if isinstance(strategy, LoraProducts):
        if settings.optimizer_state == "average":
            raise ConfigError(
                f"{strategy.name} gives the LoRA factors new directions in every round, so averaged moments do not "
                "belong to them",
                where="optimizer_state='average'",
                fix='use optimizer_state="keep" or "reset"',
            )
        if isinstance(default, ShardedState):
            raise ConfigError(
                f"{strategy.name} multiplies the two LoRA factors, and this site's ranks hold only parts of them",
                where="strategy",
                fix="use fedit or fedavg, or leave the adapter out of fully_shard()",
            )
        return LoraFactors(model, settings.exchange, settings.keep_local, strategy, beside)
    if strategy.fixed:
        _refuse_zeros(strategy, default.tensors)
    local = strategy.local_patterns
    local = tuple(pattern for pattern in local if any(matches(name, [pattern]) for name in default.tensors))
    return state_of(model, settings.exchange, (*settings.keep_local, *local), beside) if local else default


def lora_facts(facts: dict[str, str | Names], plan: SitePlan, factors: Mapping[str, Tensor]) -> dict[str, str | Names]:
    """Adapt the facts of the agreement to a LoRA strategy.

    Args:
        facts: Fact -> value, which must be equal at all sites.
        plan: What the job's strategy requires of this site.
        factors: Name -> live LoRA factor, local ones included.

    Returns:
        The facts without ranks and scales if these may differ between sites, and with a fingerprint of a factor that
        is frozen for the whole run. Empty facts stay empty.
    """
    strategy = plan.lora
    if not facts or strategy is None:
        return facts
    if isinstance(strategy, LoraProducts):
        return {name: value for name, value in facts.items() if not (strategy.mixed and name in _RANKS)}
    if strategy.fixed:
        frozen = {name: tensor for name, tensor in factors.items() if frozen_as(name) == strategy.fixed}
        facts = facts | fingerprinted(f"lora_{strategy.fixed} (frozen; seed the script before PEFT makes it)", frozen)
    return facts


def _refuse_zeros(strategy: LoraAverage, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a factor of zeros that is to be fixed: the other one would never have a gradient."""
    for name, tensor in tensors.items():
        if frozen_as(name) == strategy.fixed and not is_sharded(tensor) and not bool(tensor.detach().any()):
            raise ConfigError(
                f"this LoRA factor is zero and {strategy.name} keeps it fixed, so that the other one has no gradient",
                where=name,
                fix="initialise it with random numbers, as PEFT does, or use another strategy",
            )


class LoraFreezing:
    """Freezes one LoRA factor in the rounds whose task asks for it, through `requires_grad`.

    A factor that the user has frozen stays frozen. A frozen factor has no gradient, so the optimizer skips it, weight
    decay included.

    Attributes:
        factors: Name -> live LoRA factor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Freeze nothing as yet.

        Args:
            tensors: Name -> live tensor of the adapter, including those that never leave the site.
        """
        self.factors = {name: tensor for name, tensor in tensors.items() if factor_of(name)}
        self._trained = {name: tensor for name, tensor in self.factors.items() if tensor.requires_grad}
        self._frozen = ""

    @property
    def has_adapter(self) -> bool:
        """Whether at least one module has both factors, A and B."""
        return bool(pairs_of(self.factors))

    @property
    def held_back(self) -> tuple[str, ...]:
        """Name patterns of the factors that stay fixed in this round; no site sends them."""
        if not self._frozen:
            return ()
        return frozen_patterns("A" if self._frozen == "A" else "B")

    def begin(self, config: Mapping[str, Any], *, over: bool) -> None:
        """Freeze the factor that a task names, and train the other one.

        Args:
            config: Settings of the task.
            over: Whether the run is over. Then both factors are trained again.

        Raises:
            ConfigError: A factor would change between frozen and trained while several ranks train.
        """
        factor = "" if over else str(config.get(FROZEN, ""))
        changed = [n for n, t in self._trained.items() if t.requires_grad != (frozen_as(n) != factor)]
        if changed and ranks.several():
            raise ConfigError(
                "a LoRA factor cannot be frozen while several ranks train: DDP waits for the gradient of every "
                "parameter that was trainable when DDP wrapped the model",
                where=changed[0],
                fix="train with one process per site; for ffa-lora, freeze A (embeddings: B) before DDP wraps it",
            )
        for name, tensor in self._trained.items():
            tensor.requires_grad_(frozen_as(name) != factor)
            if not tensor.requires_grad:
                tensor.grad = None
        self._frozen = factor
