"""Changes of local training that a strategy requires, for Keras models: FedProx, SCAFFOLD and Ditto."""

from .local_backend import KerasLocalBackend

__all__ = ["KerasLocalBackend"]
