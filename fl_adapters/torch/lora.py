"""What a strategy for LoRA asks of a live torch model: what travels, what must agree, which factor is not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fl_adapters.participant.exchange import matches
from fl_adapters.participant.local_work.site_plan import SitePlan
from fl_adapters.participant.options import SiteSettings
from fl_adapters.torch import ranks
from fl_adapters.torch.agreement import fingerprint
from fl_adapters.torch.lora_factors import LoraFactors
from fl_adapters.torch.state import TorchState
from fl_runtime.aggregation.lora.names import FROZEN, factor_of, pairs_of, patterns_of
from fl_runtime.aggregation.lora.products import LoraProducts
from fl_runtime.errors import ConfigError

_RANKS = "peft.r peft.lora_alpha peft.rank_pattern peft.alpha_pattern peft.use_rslora".split()


def lora_state(model: nn.Module, travels: TorchState, settings: SiteSettings) -> TorchState:
    """What travels of `model` under the job's strategy. travels: what would do so under any other.

    Raises ConfigError for a model or settings that the strategy cannot work with.
    """
    strategy = settings.plan.lora
    if strategy is None or not pairs_of(travels.tensors):  # without an adapter the handshake refuses the strategy
        return travels
    if isinstance(strategy, LoraProducts):
        if settings.optimizer_state == "average":
            raise ConfigError(
                f"{strategy.name} gives the factors new directions, to which averaged moments do not belong",
                where="optimizer_state='average'",
                fix='use optimizer_state="keep" or "reset"',
            )
        return LoraFactors(model, settings.exchange, settings.keep_local, strategy)
    stays = patterns_of(strategy.stays) if strategy.stays else ()
    stays = tuple(pattern for pattern in stays if any(matches(name, [pattern]) for name in travels.tensors))
    return TorchState(model, settings.exchange, (*settings.keep_local, *stays)) if stays else travels


def lora_facts(facts: dict[str, str], plan: SitePlan, factors: Mapping[str, Tensor]) -> dict[str, str]:
    """`facts` of the agreement as the strategy needs them: without ranks and scales where these may differ, with a
    fingerprint of a factor that is frozen for the whole run. Empty facts stay empty."""
    strategy = plan.lora
    if not facts or strategy is None:
        return facts
    if isinstance(strategy, LoraProducts):
        return {name: value for name, value in facts.items() if not (strategy.mixed and name in _RANKS)}
    if strategy.stays and strategy.stays == strategy.frozen(1):
        frozen = {name: tensor for name, tensor in factors.items() if factor_of(name) == strategy.stays}
        facts = facts | {f"lora_{strategy.stays} (frozen; seed the script before PEFT makes it)": fingerprint(frozen)}
    return facts


class LoraFreezing:
    """Freezes a factor while tasks ask for it, by `requires_grad`; what the user has frozen stays so.

    tensors: name -> live tensor of the adapter, of those that travel and those that stay. An optimizer leaves out a
    parameter without a gradient, weight decay included.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.factors = {name: tensor for name, tensor in tensors.items() if factor_of(name)}
        self._trained = {name: tensor for name, tensor in self.factors.items() if tensor.requires_grad}
        self._frozen = ""

    @property
    def has_adapter(self) -> bool:
        """Whether there are two factors of some module."""
        return bool(pairs_of(self.factors))

    @property
    def held_back(self) -> tuple[str, ...]:
        """Patterns of what no site changes in this round."""
        if not self._frozen:
            return ()
        return patterns_of("A" if self._frozen == "A" else "B")

    def begin(self, config: Mapping[str, Any], *, over: bool) -> None:
        """Freeze what the task's settings say; nothing once the run is over. ConfigError with several ranks."""
        factor = "" if over else str(config.get(FROZEN, ""))
        changed = [n for n, t in self._trained.items() if t.requires_grad != (factor_of(n) != factor)]
        if changed and ranks.several():
            raise ConfigError(
                "a LoRA factor cannot be frozen while several ranks train: DDP waits for the gradient of every "
                "parameter that had one when it was made",
                where=changed[0],
                fix="train with one process per site; for ffa-lora, freeze A before the trainer is made",
            )
        for name, tensor in self._trained.items():
            tensor.requires_grad_(factor_of(name) != factor)
            if not tensor.requires_grad:
                tensor.grad = None
        self._frozen = factor
