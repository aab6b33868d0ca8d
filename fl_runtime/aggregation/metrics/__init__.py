"""Metrics pooled over sites."""
