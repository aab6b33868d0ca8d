"""Federated training with Lightning, for the `Trainer` of `lightning.pytorch` and of `pytorch_lightning`."""

from __future__ import annotations

from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
