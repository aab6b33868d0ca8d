"""Models that a run has left, opened with the call of the framework that trained them."""

from fl_adapters.environments.models.opening import FOLDERS, Which, load_model

__all__ = ["FOLDERS", "Which", "load_model"]
