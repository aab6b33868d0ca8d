"""Federated training with Lightning: the `Trainer` of `lightning.pytorch` and that of `pytorch_lightning`."""

from __future__ import annotations

from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
