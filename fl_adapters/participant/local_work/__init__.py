"""Local training as a strategy requires it (FedProx, SCAFFOLD, Ditto), independent of the training framework."""
