"""Strategies that combine the values of all updates at once: robust means, medians and choices."""
