"""Federated training with the Hugging Face `transformers.Trainer`, and what builds on it (`trl`'s SFTTrainer)."""

from __future__ import annotations

from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
