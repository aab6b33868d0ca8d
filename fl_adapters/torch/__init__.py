"""Federated training with a PyTorch or Accelerate loop of one's own, and what all PyTorch trainers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_adapters.torch.loop import FederatedLoop

__all__ = ["FederatedLoop"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Load `FederatedLoop` when it is asked for: the adapters of trainers import this package without it."""
    if name != "FederatedLoop":
        raise AttributeError(f"module 'fl_adapters.torch' has no attribute {name!r}")
    from fl_adapters.extras import needs_extra

    with needs_extra("torch", "PyTorch or safetensors"):
        from fl_adapters.torch.loop import FederatedLoop
    return FederatedLoop
