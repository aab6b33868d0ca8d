"""Federated training with Hugging Face's `transformers.Trainer` and trainers built on it, such as `trl.SFTTrainer`."""

from __future__ import annotations

from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
