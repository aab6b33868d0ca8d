"""FedProx, SCAFFOLD and Ditto on a live torch model."""
