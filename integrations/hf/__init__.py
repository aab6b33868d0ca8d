"""Federated training with Hugging Face's `transformers.Trainer` and trainers built on it, such as `trl.SFTTrainer`."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("hf", "transformers or a package that its adapter needs"):
    from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
