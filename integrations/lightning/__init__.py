"""Federated training with Lightning, for the `Trainer` of `lightning.pytorch` and of `pytorch_lightning`."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("lightning", "Lightning or a package that its adapter needs"):
    from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
