"""Federated training with MONAI: a handler for its trainers, unmodified bundles, and client algorithms."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("monai", "MONAI or a package that its engines need"):
    import ignite.engine  # noqa: F401  MONAI itself comes without it
    import monai.handlers  # noqa: F401

    from .client_algo import run_client_algo
    from .handler import FederatedHandler

__all__ = ["FederatedHandler", "run_client_algo"]
