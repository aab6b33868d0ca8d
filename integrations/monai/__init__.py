"""Federated training with MONAI: a handler for its trainers, unmodified bundles, and client algorithms."""

from __future__ import annotations

try:
    import ignite.engine  # noqa: F401  MONAI itself comes without it
    import monai.handlers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"MONAI or a package that its engines need is missing: pip install 'fl-adapters[monai]' ({error})"
    ) from error

from .client_algo import run_client_algo
from .handler import FederatedHandler

__all__ = ["FederatedHandler", "run_client_algo"]
