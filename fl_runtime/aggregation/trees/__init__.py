"""Strategies for tree ensembles (XGBoost), on the JSON document of a model."""
