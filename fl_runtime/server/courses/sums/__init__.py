"""Sums of updates: how they are made, and which site is to blame if they make no model."""
