"""Federated training with Keras 3's `model.fit`, on TensorFlow, PyTorch or JAX."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("keras", "Keras or its backend", also=", and one of tensorflow, torch and jax"):
    from .callback import FederatedCallback
    from .preprocessing import adapt

__all__ = ["FederatedCallback", "adapt"]
