"""Federated training with Keras 3's `model.fit`, on TensorFlow, PyTorch or JAX."""

from __future__ import annotations

from .callback import FederatedCallback

__all__ = ["FederatedCallback"]
