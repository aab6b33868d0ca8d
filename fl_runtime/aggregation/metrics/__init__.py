"""Metrics and quantile summaries, pooled over all sites."""
