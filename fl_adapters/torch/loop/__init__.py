"""Federated training in a PyTorch loop of the user's own."""

from fl_adapters.torch.loop.federated_loop import FederatedLoop

__all__ = ["FederatedLoop"]
