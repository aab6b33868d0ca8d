"""Clusters and mixtures over all sites."""
