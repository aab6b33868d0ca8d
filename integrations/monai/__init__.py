"""Federated training with MONAI: a handler for its trainers, bundles as they are, and its client algorithms."""

from __future__ import annotations

try:
    import ignite.engine  # noqa: F401  MONAI itself comes without it
    import monai.handlers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"MONAI is missing, or what its engines need: pip install 'fl-adapters[monai]' ({error})"
    ) from error

from .client_algo import run_client_algo
from .handler import FederatedHandler

__all__ = ["FederatedHandler", "run_client_algo"]
