"""Strategies that also change local training: FedProx, SCAFFOLD, Ditto."""
